//! Messages as they are on the socket, written from the protocol's text, not from the code under test.

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Read};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

pub const VERSION: u16 = 1;
pub const DMA_MAP: u16 = 2;
pub const DMA_UNMAP: u16 = 3;
pub const DEVICE_INFO: u16 = 4;
pub const REGION_INFO: u16 = 5;
pub const IRQ_INFO: u16 = 7;
pub const SET_IRQS: u16 = 8;
pub const READ: u16 = 9;
pub const WRITE: u16 = 10;
pub const RESET: u16 = 13;

pub const REPLY: u32 = 1;
pub const ERROR: u32 = 1 << 5;

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub id: u16,
    pub command: u16,
    pub flags: u32,
    pub error: u32,
    pub body: Vec<u8>,
}

/// 32-bit words one after the other; a 64-bit number is two of them.
pub fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

pub fn long(long: u64) -> [u32; 2] {
    [long as u32, (long >> 32) as u32]
}

impl Message {
    pub fn new(id: u16, command: u16, body: &[u8]) -> Self {
        Message {
            id,
            command,
            flags: 0,
            error: 0,
            body: body.into(),
        }
    }

    pub fn reply(&self, body: &[u8]) -> Self {
        Message {
            flags: REPLY,
            ..Message::new(self.id, self.command, body)
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.id.to_le_bytes().to_vec();
        bytes.extend(self.command.to_le_bytes());
        bytes.extend(words(&[
            16 + self.body.len() as u32,
            self.flags,
            self.error,
        ]));
        bytes.extend(&self.body);
        bytes
    }

    /// Reads one; `None` at the end.
    pub fn read(stream: &mut UnixStream) -> Option<(Self, Option<OwnedFd>)> {
        let mut head = [0; 16];
        let mut control = nix::cmsg_space!([RawFd; 4]);
        let mut parts = [IoSliceMut::new(&mut head)];
        let flags = MsgFlags::MSG_WAITALL | MsgFlags::MSG_CMSG_CLOEXEC;
        let got = recvmsg::<UnixAddr>(stream.as_raw_fd(), &mut parts, Some(&mut control), flags);
        let got = got.ok().filter(|got| got.bytes == 16)?;
        let mut file = None;
        for control in got.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(fds) = control {
                // SAFETY: the kernel made it for this process just now.
                file = Some(unsafe { OwnedFd::from_raw_fd(fds[0]) });
            }
        }
        let word = |at: usize| u32::from_le_bytes(head[at..at + 4].try_into().unwrap());
        let mut message = Message {
            id: word(0) as u16,
            command: (word(0) >> 16) as u16,
            flags: word(8),
            error: word(12),
            body: vec![0; word(4) as usize - 16],
        };
        stream.read_exact(&mut message.body).ok()?;
        Some((message, file))
    }
}

/// Sends bytes, with files.
pub fn send(stream: &UnixStream, bytes: &[u8], files: &[&OwnedFd]) -> bool {
    let fds: Vec<RawFd> = files.iter().map(|file| file.as_raw_fd()).collect();
    let control = [ControlMessage::ScmRights(&fds)];
    let control: &[_] = if fds.is_empty() { &[] } else { &control };
    let parts = [IoSlice::new(bytes)];
    let sent = sendmsg::<UnixAddr>(
        stream.as_raw_fd(),
        &parts,
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    );
    sent.is_ok_and(|sent| sent == bytes.len())
}

/// A file in memory, that can or cannot shrink.
pub fn memory(len: u64, sealed: bool) -> OwnedFd {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let file = File::from(memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap());
    file.set_len(len).unwrap();
    if sealed {
        fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    }
    file.into()
}
