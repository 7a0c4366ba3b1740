//! The client against servers that break the protocol: it reports them, and neither hangs nor crashes.

use crate::wire::*;
use proptest::prelude::*;
use rdsock_vfio::user::UserDevice;
use rdsock_vfio::{BusError, Device, EventFd, Space};
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

/// What a server does with a message, before it would answer as it should.
type Manners = Box<dyn FnMut(&Message, &mut UnixStream) -> Doing + Send>;

enum Doing {
    /// It answers as it should.
    Good,
    /// It has done something else.
    Done,
    /// It closes the connection.
    Close,
}

/// A server with one client, and whatever manners.
struct Server {
    _folder: tempfile::TempDir,
    path: std::path::PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    fn start(mut manners: Manners) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sock");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            while let Some((message, _)) = Message::read(&mut stream) {
                match manners(&message, &mut stream) {
                    // The client may have gone by the time.
                    Doing::Good => drop(stream.write_all(&good(&message).bytes())),
                    Doing::Done => {}
                    Doing::Close => return,
                }
            }
        });
        Server {
            _folder: folder,
            path,
            thread: Some(thread),
        }
    }

    /// A server that answers one command with these bytes.
    fn answering(command: u16, bytes: impl Fn(&Message) -> Vec<u8> + Send + 'static) -> Self {
        Server::start(Box::new(move |message, stream| {
            if message.command != command {
                return Doing::Good;
            }
            // The client may have gone by the time.
            let _ = stream.write_all(&bytes(message));
            Doing::Done
        }))
    }

    fn connect(&self) -> Result<UserDevice, BusError> {
        UserDevice::connect_with(&self.path, Duration::from_secs(10))
    }

    /// As [`Server::connect`], for a server that is not expected to answer in time.
    fn connect_in_vain(&self) -> String {
        let connected = UserDevice::connect_with(&self.path, Duration::from_millis(200));
        connected.expect_err("it does not answer").to_string()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // In case nobody has connected.
        drop(UnixStream::connect(&self.path));
        self.thread.take().unwrap().join().unwrap();
    }
}

/// The right answer of a device with 4 KiB in regions 0 and 2, and two vectors.
fn good(message: &Message) -> Message {
    let word = |at: usize| u32::from_le_bytes(message.body[at..at + 4].try_into().unwrap());
    let body = match message.command {
        VERSION => [&words(&[1 << 16])[..], b"{}\0"].concat(),
        DEVICE_INFO => words(&[16, 0b11, 9, 5]),
        REGION_INFO => {
            let size = if matches!(word(8), 0 | 2 | 7) {
                4096
            } else {
                0
            };
            words(&[32, 3, word(8), 0, size, 0, 0, 0])
        }
        IRQ_INFO => words(&[16, 1, word(8), if word(8) == 2 { 2 } else { 0 }]),
        READ => [message.body.clone(), vec![0; word(12) as usize]].concat(),
        WRITE => message.body[..16].to_vec(),
        DMA_UNMAP => message.body.clone(),
        _ => vec![],
    };
    message.reply(&body)
}

fn error_of(server: &Server) -> String {
    server
        .connect()
        .expect_err("it breaks the protocol")
        .to_string()
}

#[test]
fn a_server_with_good_manners_is_a_device() {
    let server = Server::start(Box::new(|_, _| Doing::Good));
    let device = server.connect().unwrap();
    assert_eq!(
        (device.vectors(), device.region(0).unwrap().size),
        (2, 4096)
    );
    assert!(matches!(device.region(1), Err(BusError::Missing { .. })));
    assert_eq!(device.registers(0).unwrap().read64(8), 0);
    device.reset().unwrap();
    device
        .set_interrupt(1, Some(Arc::new(EventFd::new().unwrap())))
        .unwrap();
    assert!(device.set_interrupt(2, None).is_err());
    drop(device);
}

#[test]
fn nobody_there_is_said() {
    let error = UserDevice::connect(std::path::Path::new("/nowhere/sock")).unwrap_err();
    assert!(error.to_string().contains("does it run"), "{error}");
}

#[test]
fn silence_and_closing_end_the_connection() {
    for command in [VERSION, DEVICE_INFO, REGION_INFO, IRQ_INFO, READ, WRITE] {
        let silent = Server::answering(command, |_| vec![]);
        assert!(silent.connect_in_vain().contains("within the time"));
        let closing = Server::start(Box::new(move |message, _| {
            if message.command == command {
                Doing::Close
            } else {
                Doing::Good
            }
        }));
        assert!(error_of(&closing).contains("closed"));
    }
}

#[test]
fn a_drip_of_bytes_does_not_hold_it() {
    let server = Server::start(Box::new(|message, stream| {
        for byte in good(message).bytes() {
            if stream.write_all(&[byte]).is_err() {
                return Doing::Close;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        Doing::Done
    }));
    assert!(server.connect_in_vain().contains("within the time"));
}

#[test]
fn answers_that_cannot_be_are_named() {
    type Spoil = fn(&mut Message);
    let spoils: [(Spoil, &str); 6] = [
        (|answer| answer.id += 1, "another question"),
        (|answer| answer.command += 1, "another question"),
        (|answer| answer.flags = 0, "asked for something"),
        (|answer| answer.flags = 2, "asked for something"),
        (|answer| answer.body.clear(), "too short"),
        (|answer| answer.body.truncate(3), "too short"),
    ];
    for command in [VERSION, DEVICE_INFO, REGION_INFO, IRQ_INFO] {
        for (spoil, said) in spoils {
            let server = Server::answering(command, move |message| {
                let mut answer = good(message);
                spoil(&mut answer);
                answer.bytes()
            });
            let error = error_of(&server);
            assert!(error.contains(said), "{command}: {error}");
        }
        // Sizes in the header: less than itself, and absurd.
        for size in [0, 15, 1 << 20, u32::MAX] {
            let server = Server::answering(command, move |message| {
                let mut bytes = good(message).bytes();
                bytes[4..8].copy_from_slice(&size.to_le_bytes());
                bytes
            });
            assert!(
                error_of(&server).contains("impossible size"),
                "{command} {size}"
            );
        }
    }
}

#[test]
fn refusals_are_reported_with_their_errno() {
    for command in [VERSION, DEVICE_INFO, REGION_INFO, IRQ_INFO, READ, WRITE] {
        for (errno, expected) in [(13, 13), (0, 5), (u32::MAX, 5)] {
            let server = Server::answering(command, move |message| {
                let flags = REPLY | ERROR;
                let refusal = Message {
                    flags,
                    error: errno,
                    ..message.reply(&[])
                };
                refusal.bytes()
            });
            let error = server.connect().unwrap_err();
            let BusError::Refused { source, .. } = error else {
                panic!("{error}");
            };
            assert_eq!(source.raw_os_error(), Some(expected));
        }
    }
}

#[test]
fn descriptions_that_make_no_sense_are_refused() {
    let cases: [(u16, Vec<u8>, &str); 5] = [
        (VERSION, words(&[1]), "major version"),
        (DEVICE_INFO, words(&[16, 1, 9, 5]), "no PCI device"),
        (DEVICE_INFO, words(&[16, 2, 7, 5]), "no PCI device"),
        (
            REGION_INFO,
            words(&[32, 3, 99, 0, 0, 0, 0, 0]),
            "another region",
        ),
        (
            REGION_INFO,
            words(&[32, 0xb, 0, 32, 0, 0, 0, 0, 1]),
            "malformed",
        ),
    ];
    for (command, body, said) in cases {
        let server = Server::answering(command, move |message| message.reply(&body).bytes());
        let error = error_of(&server);
        assert!(error.contains(said), "{error}");
    }
    // It promises capabilities, and never sends them.
    let server = Server::answering(REGION_INFO, |message| {
        let argsz = u32::from_le_bytes(message.body[..4].try_into().unwrap());
        let index = message.body[8];
        message
            .reply(&words(&[argsz + 8, 0xf, index.into(), 32, 4096, 0, 0, 0]))
            .bytes()
    });
    assert!(error_of(&server).contains("does not say"));
}

/// Offers region 2 with a file, and an area of it.
fn offering(file: OwnedFd, offset: u64, size: u64) -> Server {
    Server::start(Box::new(move |message, stream| {
        if message.command != REGION_INFO || message.body[8] != 2 {
            return Doing::Good;
        }
        let mut body = words(&[64, 0xf, 2, 32, 4096, 0, 0, 0, 1 | 1 << 16, 0, 1, 0]);
        body.extend(words(&[long(offset), long(size)].concat()));
        send(stream, &message.reply(&body).bytes(), &[&file]);
        Doing::Done
    }))
}

#[test]
fn a_region_is_mapped_only_when_that_is_safe() {
    let file = memory(4096, true);
    let server = offering(file.try_clone().unwrap(), 0, 4096);
    let device = server.connect().unwrap();
    let registers = device.registers(2).unwrap();
    registers.write64(16, 0x1234);
    let mut bytes = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&std::fs::File::from(file), &mut bytes, 16).unwrap();
    assert_eq!(bytes, 0x1234u64.to_le_bytes());
    drop(device);
    // The file could shrink, is too short, or the area lies outside of the region: messages it is.
    for (file, offset, size) in [
        (memory(4096, false), 0, 4096),
        (memory(4095, true), 0, 4096),
        (memory(8192, true), 4096, 4096),
        (memory(8192, true), u64::MAX, 4096),
        (memory(4096, true), 0, 0),
    ] {
        let server = offering(file, offset, size);
        let device = server.connect().unwrap();
        let registers = device.registers(2).unwrap();
        registers.write64(16, 0x1234);
        assert_eq!(
            registers.read64(16),
            0,
            "as the server answers to all reads"
        );
        drop(device);
    }
}

#[test]
fn a_device_whose_server_goes_or_talks_unasked_reads_all_ones() {
    for unasked in [true, false] {
        let server = Server::start(Box::new(move |message, stream| {
            if message.command != RESET {
                return Doing::Good;
            }
            if !unasked {
                stream.write_all(&good(message).bytes()).unwrap();
                // What comes next, the client's enabling, is not answered.
                return Doing::Close;
            }
            stream.write_all(&good(message).bytes()).unwrap();
            Doing::Done
        }));
        let device = server.connect().unwrap();
        let registers = device.registers(0).unwrap();
        assert_eq!(registers.read32(0), 0);
        let reset = device.reset();
        assert_eq!(reset.is_ok(), unasked);
        if !unasked {
            assert_eq!(registers.read32(0), u32::MAX);
            assert_eq!(registers.read64(8), u64::MAX);
            registers.write32(0, 1);
            assert!(device.reset().unwrap_err().to_string().contains("is gone"));
        }
        drop(device);
    }
}

#[test]
fn data_of_another_length_or_place_are_not_believed() {
    type Spoil = fn(&mut Message);
    let spoils: [Spoil; 4] = [
        |answer| answer.body.push(0),
        |answer| answer.body.truncate(16),
        |answer| answer.body[0] ^= 1,
        |answer| answer.body[12] = 8,
    ];
    for spoil in spoils {
        let mut reads = 0;
        let server = Server::start(Box::new(move |message, stream| {
            reads += u32::from(message.command == READ);
            // The first is the client's, of the configuration space.
            if message.command != READ || reads == 1 {
                return Doing::Good;
            }
            let mut answer = good(message);
            spoil(&mut answer);
            let _ = stream.write_all(&answer.bytes());
            Doing::Done
        }));
        let device = server.connect().unwrap();
        assert_eq!(device.registers(0).unwrap().read32(0), u32::MAX);
        drop(device);
    }
}

#[test]
fn memory_that_the_server_refuses_is_not_mapped() {
    let mut maps = 0;
    let server = Server::start(Box::new(move |message, stream| {
        maps += u32::from(message.command == DMA_MAP);
        if message.command != DMA_MAP || maps != 1 {
            return Doing::Good;
        }
        let flags = REPLY | ERROR;
        let refusal = Message {
            flags,
            error: 12,
            ..message.reply(&[])
        };
        stream.write_all(&refusal.bytes()).unwrap();
        Doing::Done
    }));
    let device: Arc<dyn Device> = Arc::new(server.connect().unwrap());
    let space = Space::new(device);
    let refused = space.allocate(4096).unwrap_err();
    assert!(
        refused.to_string().contains("refused to map memory"),
        "{refused}"
    );
    let memory = space.allocate(4096).unwrap();
    assert_eq!(
        memory.iova(),
        1 << 20,
        "the refused addresses are free again"
    );
    drop((memory, space));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn noise_harms_nobody(
        command in prop_oneof![
            Just(VERSION), Just(DEVICE_INFO), Just(REGION_INFO), Just(IRQ_INFO), Just(READ),
        ],
        at in 0..80usize,
        noise in proptest::collection::vec(any::<u8>(), 1..40),
    ) {
        let server = Server::answering(command, move |message| {
            let mut bytes = good(message).bytes();
            for (place, byte) in bytes.iter_mut().skip(at).zip(&noise) {
                *place = *byte;
            }
            bytes
        });
        let connected = UserDevice::connect_with(&server.path, Duration::from_millis(20));
        if let Ok(device) = connected {
            if let Ok(registers) = device.registers(0) {
                registers.read64(0);
            }
            drop(device);
        }
    }
}

/// It would be given the memory of all streams. Anybody can put a socket into a directory like `/tmp`.
#[test]
fn a_server_of_another_user_is_told_nothing() {
    const STRANGER: u32 = 64021;
    if !nix::unistd::geteuid().is_root() {
        let why = b"SKIPPED, NOTHING WAS CHECKED: only root can be another user\n";
        return std::io::stderr().write_all(why).unwrap();
    }
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("sock");
    let at = path.clone();
    let server = std::thread::spawn(move || {
        let listener = UnixListener::bind(&at).unwrap();
        // SAFETY: takes three integers. The call itself, without libc, is this thread's alone.
        let result = unsafe { libc::syscall(libc::SYS_setresuid, STRANGER, STRANGER, STRANGER) };
        assert_eq!(result, 0);
        // The kernel tells who has called `listen` last.
        let backlog = nix::sys::socket::Backlog::new(1).unwrap();
        nix::sys::socket::listen(&listener, backlog).unwrap();
        listener
    });
    let listener = server.join().unwrap();
    let told = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        Message::read(&mut stream).is_some()
    });
    let error = UserDevice::connect_with(&path, Duration::from_secs(1)).unwrap_err();
    assert!(!told.join().unwrap(), "it was told something");
    let error = error.to_string();
    assert!(error.contains("user 64021 serves it"), "{error}");
}
