//! Programs with rights of their own (set-user-id, capabilities, …) that somebody else starts.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::actor::{VICTIM, say};
use super::{Request, TcpStream, announcement, request};

/// What a program is allowed beyond what whoever starts it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    SetUserId,
    SetGroupId,
    Capability,
    Nothing,
}

/// A compiled `victim.c`.
pub struct Program {
    dir: tempfile::TempDir,
}

impl Program {
    pub fn with(rights: Rights) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).unwrap();
        let program = Program { dir };
        let (source, path) = (program.dir.path().join("victim.c"), program.path());
        std::fs::write(&source, include_str!("victim.c")).unwrap();
        let compiled = Command::new("cc").arg("-o").arg(&path).arg(source).status();
        assert!(compiled.unwrap().success(), "a C compiler is needed: gcc");
        let (user, group, mode) = match rights {
            Rights::SetUserId => (VICTIM, 0, 0o4755),
            Rights::SetGroupId => (0, VICTIM, 0o2755),
            Rights::Capability | Rights::Nothing => (0, 0, 0o755),
        };
        chown(&path, Some(user), Some(group)).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
        if rights == Rights::Capability {
            allow_raw_sockets(&path);
        }
        program
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("victim")
    }
}

/// As `setcap cap_net_raw+ep` does: the second version of `struct vfs_cap_data`.
fn allow_raw_sockets(path: &Path) {
    const NET_RAW: u32 = 13;
    let words = [0x0200_0001_u32, 1 << NET_RAW, 0, 0, 0];
    let value: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
    let path = CString::new(path.as_os_str().as_bytes()).unwrap();
    // SAFETY: two strings that end with 0, and a buffer with its length.
    let result = unsafe {
        libc::setxattr(
            path.as_ptr(),
            c"security.capability".as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// What `victim.c` says of its connection. Anybody may ask the kernel for all of it (`sock_diag`): the
/// attacker here is spared that.
pub fn claim(numbers: &[u64]) -> Request {
    let loopback = std::net::Ipv4Addr::LOCALHOST.to_ipv6_mapped().octets();
    Request {
        fd: numbers[0] as i32,
        cookie: numbers[1],
        netns: numbers[2],
        local: loopback,
        peer: loopback,
        local_port: numbers[3] as u32,
        peer_port: numbers[4] as u32,
        active: 1,
        ..request(super::request::ANNOUNCE, 7, 1)
    }
}

/// Says of a connection of this process what `victim.c` would, and its stream.
pub fn say_connected(stream: &TcpStream, stream_id: u64) {
    let own = announcement(1, 1, stream, 1);
    say(&format!(
        "connected {} {} {} {} {} {} {} {stream_id}",
        own.fd,
        own.cookie,
        own.netns,
        own.local_port,
        own.peer_port,
        nix::unistd::geteuid(),
        nix::unistd::getegid()
    ));
}
