//! The server against clients that break the protocol: they get an errno, or lose their connection, and the next client
//! finds a device as new.

use crate::wire::*;
use proptest::prelude::*;
use rdsock_model::{Chaos, Fabric};
use rdsock_vfio::Device;
use rdsock_vfio::serve::{Server, Serving};
use rdsock_vfio::user::UserDevice;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

struct Served {
    folder: tempfile::TempDir,
    server: Server,
}

impl Served {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let serving = Serving {
            queue_sets: 2,
            trapped: true,
        };
        let fabric = Fabric::new(Chaos::default());
        let server = Server::start(&fabric, &folder.path().join("sock"), serving).unwrap();
        Served { folder, server }
    }

    fn connect(&self) -> Client {
        let stream = UnixStream::connect(self.folder.path().join("sock")).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(10)))
            .unwrap();
        Client { stream, id: 0 }
    }

    /// A client that has said its version.
    fn greet(&self) -> Client {
        let mut client = self.connect();
        assert_eq!(client.ask(VERSION, &words(&[1 << 16])), Ok(version()));
        client
    }

    /// A client with manners finds a device as new.
    fn is_well(&self) {
        let device = UserDevice::connect(&self.folder.path().join("sock")).unwrap();
        let registers = device.registers(0).unwrap();
        assert_eq!(registers.read64(0), u64::from_le_bytes(*b"rdsockRD"));
        assert_eq!((registers.read32(0x40), registers.read32(0x44)), (0, 1));
    }
}

fn version() -> Vec<u8> {
    let capabilities = b"{\"capabilities\":{\"max_msg_fds\":8,\"max_data_xfer_size\":65536}}\0";
    [&words(&[1 << 16])[..], capabilities].concat()
}

struct Client {
    stream: UnixStream,
    id: u16,
}

impl Client {
    /// The answer's body, or errno.
    fn ask_with(&mut self, command: u16, body: &[u8], files: &[&OwnedFd]) -> Result<Vec<u8>, u32> {
        self.id += 1;
        let message = Message::new(self.id, command, body);
        assert!(send(&self.stream, &message.bytes(), files));
        let (answer, _) = Message::read(&mut self.stream).expect("an answer");
        assert_eq!((answer.id, answer.command), (self.id, command));
        assert_eq!(answer.flags & REPLY, REPLY);
        match answer.flags & ERROR {
            0 => Ok(answer.body),
            _ => Err(answer.error),
        }
    }

    fn ask(&mut self, command: u16, body: &[u8]) -> Result<Vec<u8>, u32> {
        self.ask_with(command, body, &[])
    }

    fn read(&mut self, region: u32, offset: u64, count: u32) -> Result<Vec<u8>, u32> {
        let asked = words(&[&long(offset)[..], &[region, count]].concat());
        let answer = self.ask(READ, &asked)?;
        assert_eq!(answer[..16], asked);
        Ok(answer[16..].to_vec())
    }

    fn write(&mut self, region: u32, offset: u64, data: &[u8]) -> Result<Vec<u8>, u32> {
        let mut body = words(&[&long(offset)[..], &[region, data.len() as u32]].concat());
        body.extend(data);
        self.ask(WRITE, &body)
    }

    fn map(&mut self, flags: u32, at: [u64; 3], file: Option<&OwnedFd>) -> Result<Vec<u8>, u32> {
        let [offset, address, size] = at.map(long);
        let body = words(&[&[32, flags], &offset[..], &address, &size].concat());
        self.ask_with(DMA_MAP, &body, &Vec::from_iter(file))
    }

    fn unmap(&mut self, flags: u32, address: u64, size: u64) -> Result<Vec<u8>, u32> {
        let body = words(&[&[24, flags], &long(address)[..], &long(size)].concat());
        self.ask(DMA_UNMAP, &body)
    }

    /// The server has closed the connection.
    fn is_dropped(&mut self) -> bool {
        self.stream.read(&mut [0]).is_ok_and(|read| read == 0) || self.stream.write(&[0]).is_err()
    }
}

const EINVAL: u32 = 22;
const EPROTO: u32 = 71;
const EOPNOTSUPP: u32 = 95;
const EEXIST: u32 = 17;

#[test]
fn nothing_is_done_before_the_version_is_agreed_on() {
    let served = Served::start();
    let mut client = served.connect();
    for command in [DEVICE_INFO, RESET, READ, DMA_MAP, 99] {
        assert_eq!(client.ask(command, &[0; 64]), Err(EPROTO));
    }
    assert_eq!(client.ask(VERSION, &[]), Err(EINVAL));
    assert_eq!(client.ask(VERSION, &words(&[7])), Err(93));
    assert_eq!(client.ask(DEVICE_INFO, &[0; 16]), Err(EPROTO));
    // No capabilities, or ones that are no text, are as good as any.
    assert_eq!(
        client.ask(VERSION, &words(&[9 << 16, u32::MAX])),
        Ok(version())
    );
    assert!(client.ask(DEVICE_INFO, &[0; 16]).is_ok());
}

#[test]
fn messages_that_make_no_sense_get_an_errno_and_the_next_one_is_served() {
    let served = Served::start();
    let mut client = served.greet();
    for command in [
        DMA_MAP,
        DMA_UNMAP,
        REGION_INFO,
        IRQ_INFO,
        SET_IRQS,
        READ,
        WRITE,
    ] {
        assert_eq!(client.ask(command, &[]), Err(EINVAL));
        assert_eq!(client.ask(command, &[0; 7]), Err(EINVAL));
    }
    for command in [0, 6, 11, 12, 14, 15, 16, u16::MAX] {
        assert_eq!(client.ask(command, &[0; 100]), Err(EOPNOTSUPP));
    }
    for (region, offset, count) in [
        (0, 0, u32::MAX),
        (0, 0x20000, 4),
        (0, 0x1ffff, 2),
        (0, u64::MAX, 8),
        (1, 0, 4),
        (9, 0, 1),
        (u32::MAX, 0, 4),
        (4, 0, 0x10001),
    ] {
        assert_eq!(client.read(region, offset, count), Err(EINVAL));
    }
    assert_eq!(client.write(7, 4096, &[0]), Err(EINVAL));
    // More data than it says, and less.
    let access = |count| words(&[0, 0, 0, count]);
    assert_eq!(
        client.ask(WRITE, &[access(8), vec![0; 7]].concat()),
        Err(EINVAL)
    );
    assert_eq!(
        client.ask(WRITE, &[access(4), vec![0; 5]].concat()),
        Err(EINVAL)
    );
    for region in [9, u32::MAX] {
        assert_eq!(
            client.ask(REGION_INFO, &words(&[32, 0, region, 0, 0, 0, 0, 0])),
            Err(EINVAL)
        );
    }
    assert_eq!(client.ask(IRQ_INFO, &words(&[16, 0, 5, 0])), Err(EINVAL));
    assert_eq!(client.read(0, 0, 8), Ok(b"rdsockRD".to_vec()));
    // What is no register of its width reads all ones.
    for (offset, count) in [(0, 4), (4, 8), (0x40, 2), (0x40, 3), (0xf000, 8)] {
        assert_eq!(
            client.read(0, offset, count),
            Ok(vec![0xff; count as usize])
        );
    }
    drop(client);
    served.is_well();
}

#[test]
fn interrupts_are_checked() {
    let served = Served::start();
    let mut client = served.greet();
    let eventfd = rdsock_vfio::EventFd::from_flags(rdsock_vfio::EventFlags::EFD_NONBLOCK).unwrap();
    let fd: OwnedFd = std::os::fd::AsFd::as_fd(&eventfd)
        .try_clone_to_owned()
        .unwrap();
    let set = |flags, index, start, count| words(&[20, flags, index, start, count]);
    for (body, files) in [
        (set(0x24, 2, 3, 1), 1),
        (set(0x24, 2, u32::MAX, 2), 1),
        (set(0x24, 2, 0, u32::MAX), 1),
        (set(0x24, 2, 0, 2), 1),
        (set(0x24, 2, 0, 1), 2),
        (set(0x24, 0, 0, 1), 1),
        (set(0x24, 77, 0, 0), 0),
        (set(0x27, 2, 0, 1), 1),
        (set(0x0c, 2, 0, 1), 1),
        (set(0x22, 2, 0, 2), 0),
        (set(0, 2, 0, 1), 0),
    ] {
        let files = vec![&fd; files];
        assert_eq!(
            client.ask_with(SET_IRQS, &body, &files),
            Err(EINVAL),
            "{body:?}"
        );
    }
    // As virtual machines do: take away what there is not, set one, fire it, end all.
    assert_eq!(client.ask(SET_IRQS, &set(0x24, 2, 0, 3)), Ok(vec![]));
    assert_eq!(
        client.ask_with(SET_IRQS, &set(0x24, 2, 1, 1), &[&fd]),
        Ok(vec![])
    );
    assert_eq!(client.ask(SET_IRQS, &set(0x21, 2, 1, 1)), Ok(vec![]));
    assert_eq!(eventfd.read(), Ok(1));
    assert_eq!(
        client.ask(SET_IRQS, &[set(0x22, 2, 0, 2), vec![1, 1]].concat()),
        Ok(vec![])
    );
    assert_eq!(eventfd.read(), Ok(1));
    assert_eq!(client.ask(SET_IRQS, &set(0x21, 2, 0, 0)), Ok(vec![]));
    assert_eq!(client.ask(SET_IRQS, &set(0x21, 2, 1, 1)), Ok(vec![]));
    assert!(eventfd.read().is_err());
    assert_eq!(client.ask(SET_IRQS, &set(0x21, 0, 0, 0)), Ok(vec![]));
    // One that blocks whoever adds to it is passed over.
    eventfd.write(u64::MAX - 1).unwrap();
    assert_eq!(
        client.ask_with(SET_IRQS, &set(0x24, 2, 1, 1), &[&fd]),
        Ok(vec![])
    );
    assert_eq!(client.ask(SET_IRQS, &set(0x21, 2, 1, 1)), Ok(vec![]));
}

#[test]
fn memory_is_checked_and_taken_back_in_any_ranges() {
    let served = Served::start();
    let mut client = served.greet();
    let file = memory(1 << 20, true);
    let page = [0, 0x10_0000, 0x1000];
    assert_eq!(
        client.map(3, page, Some(&memory(1 << 20, false))),
        Err(EINVAL)
    );
    for (flags, at) in [
        (0, page),
        (2, page),
        (7, page),
        (3, [0, 0x10_0000, 0]),
        (3, [1 << 20, 0x10_0000, 0x1000]),
        (3, [u64::MAX, 0x10_0000, 0x1000]),
        (3, [0, 0x10_0000, u64::MAX]),
        (3, [0, 0x10_0000, (1 << 20) + 1]),
    ] {
        assert_eq!(
            client.map(flags, at, Some(&file)),
            Err(EINVAL),
            "{flags} {at:x?}"
        );
    }
    // The addresses would wrap.
    assert_eq!(
        client.map(3, [0, u64::MAX - 0xfff, 0x1000], Some(&file)),
        Err(EEXIST)
    );
    let two = [&file, &file];
    let body = words(&[32, 3, 0, 0, 0, 0, 0x1000, 0]);
    assert_eq!(client.ask_with(DMA_MAP, &body, &two), Err(EINVAL));
    // Without a file: nothing that could be reached, but a virtual machine is not to fail for it.
    assert_eq!(client.map(3, page, None), Ok(vec![]));
    assert_eq!(client.map(3, page, Some(&file)), Ok(vec![]));
    assert_eq!(
        client.map(1, [0, 0x10_0800, 0x1000], Some(&file)),
        Err(EEXIST)
    );
    // Ranges as virtual machines give them: of nothing, of much, and ones that wrap.
    for (address, size) in [
        (0, 0x1000),
        (0xfef0_0000, 0xffff_ffff_0110_0000),
        (0, u64::MAX),
        (u64::MAX, u64::MAX),
        (0x10_0000, 0),
    ] {
        assert!(client.unmap(0, address, size).is_ok());
    }
    assert_eq!(client.map(3, page, Some(&file)), Ok(vec![]));
    assert_eq!(client.unmap(1, 0, 0), Err(EINVAL));
    assert_eq!(client.unmap(4, 0, 0), Err(EINVAL));
    assert!(client.unmap(2, 0, 0).is_ok());
    assert_eq!(client.map(3, page, Some(&file)), Ok(vec![]));
    // A piece out of the middle leaves the rest.
    assert_eq!(
        client.map(3, [0, 0x20_0000, 0x3000], Some(&file)),
        Ok(vec![])
    );
    assert!(client.unmap(0, 0x20_1000, 0x1000).is_ok());
    assert_eq!(
        client.map(3, [0, 0x20_1000, 0x1000], Some(&file)),
        Ok(vec![])
    );
    assert_eq!(
        client.map(3, [0, 0x20_2000, 0x1000], Some(&file)),
        Err(EEXIST)
    );
    assert_eq!(
        client.map(3, [0, 0x20_0000, 0x1000], Some(&file)),
        Err(EEXIST)
    );
    drop(client);
    served.is_well();
}

#[test]
fn a_stream_that_is_no_protocol_is_dropped() {
    let served = Served::start();
    let spoils: [fn(&mut Vec<u8>); 4] = [
        |bytes| bytes[4..8].copy_from_slice(&15u32.to_le_bytes()),
        |bytes| bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes()),
        |bytes| bytes[4..8].copy_from_slice(&(80u32 << 10).to_le_bytes()),
        // An answer, where nothing was asked.
        |bytes| bytes[8] = 1,
    ];
    for spoil in spoils {
        let mut client = served.greet();
        let mut bytes = Message::new(1, DEVICE_INFO, &[0; 16]).bytes();
        spoil(&mut bytes);
        client.stream.write_all(&bytes).unwrap();
        assert!(client.is_dropped());
        served.is_well();
    }
    // Half a message, and an end.
    let mut client = served.greet();
    client.stream.write_all(&[1, 0, 4, 0, 32]).unwrap();
    drop(client);
    served.is_well();
}

#[test]
fn a_second_client_is_turned_away() {
    let served = Served::start();
    let mut first = served.greet();
    let mut second = served.connect();
    assert!(second.is_dropped());
    assert!(first.ask(RESET, &[]).is_ok());
    drop(first);
    served.is_well();
}

#[test]
fn what_one_client_leaves_the_next_does_not_find() {
    let served = Served::start();
    let mut client = served.greet();
    client.write(0, 0x40, &5u32.to_le_bytes()).unwrap();
    client.write(0, 0x48, &2u32.to_le_bytes()).unwrap();
    client.write(7, 4, &[6, 0]).unwrap();
    client.write(2, 0x10, &[1; 8]).unwrap();
    assert_eq!(client.read(2, 0x10, 8), Ok(vec![1; 8]));
    assert_eq!(client.read(0, 0x44, 4), Ok(vec![3, 0, 0, 0]));
    drop(client);
    let mut next = served.greet();
    assert_eq!(next.read(0, 0x40, 4), Ok(vec![0; 4]));
    assert_eq!(next.read(0, 0x44, 4), Ok(vec![1, 0, 0, 0]));
    assert_eq!(next.read(7, 4, 2), Ok(vec![0; 2]));
    assert_eq!(next.read(2, 0x10, 8), Ok(vec![0; 8]));
    assert_eq!(served.server.function().counters().resets, 1);
    // A function level reset, as a guest asks for it.
    next.write(0, 0x40, &5u32.to_le_bytes()).unwrap();
    next.write(7, 0x48, &[0, 0x80]).unwrap();
    assert_eq!(next.read(0, 0x40, 4), Ok(vec![0; 4]));
    assert_eq!(next.read(0, 0x50, 8), Ok(vec![2, 0, 0, 0, 0, 0, 0, 0]));
}

#[test]
fn a_socket_is_taken_from_the_dead_but_not_from_the_living() {
    let served = Served::start();
    let path = served.folder.path().join("sock");
    let fabric = Fabric::new(Chaos::default());
    let serving = Serving {
        queue_sets: 1,
        trapped: false,
    };
    assert!(Server::start(&fabric, &path, serving).is_err());
    served.is_well();
    let file = served.folder.path().join("file");
    std::fs::write(&file, "mine").unwrap();
    assert!(Server::start(&fabric, &file, serving).is_err());
    assert_eq!(std::fs::read(&file).unwrap(), b"mine");
    let left = served.folder.path().join("left");
    drop(std::os::unix::net::UnixListener::bind(&left).unwrap());
    drop(Server::start(&fabric, &left, serving).unwrap());
    assert!(!left.exists());
    for queue_sets in [0, 3, 512] {
        let serving = Serving {
            queue_sets,
            trapped: false,
        };
        assert!(Server::start(&fabric, &left, serving).is_err());
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn noise_harms_nobody(
        messages in proptest::collection::vec(
            (0..16u16, any::<u32>(), proptest::collection::vec(
                prop_oneof![0..10u32, Just(32), Just(u32::MAX), any::<u32>()], 0..10)),
            1..30),
    ) {
        let served = Served::start();
        let file = memory(8192, true);
        let mut client = served.greet();
        for (command, seed, body) in messages {
            let files = match seed % 3 { 0 => vec![&file], 1 => vec![], _ => vec![&file; 3] };
            let answered = client.ask_with(command, &words(&body), &files);
            prop_assert!(!matches!(answered, Err(0)));
        }
        drop(client);
        served.is_well();
    }
}
