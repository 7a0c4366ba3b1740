//! What the target refuses, what memory the device cannot reach, and what it costs others: nothing.
#[allow(dead_code)]
mod nodes;

use nodes::*;
use rdsock_rde::spec::{Key, Status, status};
use rdsock_rde::*;
use rdsock_vfio::Shared;
use std::sync::Arc;

/// Executes an operation of node 1 on node 2: its status.
fn outcome(nodes: &mut Nodes, operation: Operation<'_>) -> Status {
    let target = 2;
    nodes.nodes[0].post(&work(target, 0, operation));
    nodes.settle();
    let done = nodes.nodes[0].completions();
    assert_eq!(done.len(), 1);
    done[0].status
}

fn put(nodes: &mut Nodes, to: Remote) -> Status {
    let notify = Some(Notify {
        set: 0,
        payload: b"never sent",
    });
    let operation = Operation::Write {
        to,
        data: Data::Inline(b"12345678"),
        word: None,
        notify,
    };
    outcome(nodes, operation)
}

#[test]
fn an_operation_is_refused_as_a_whole() {
    let mut nodes = Nodes::pair();
    let good = nodes.nodes[1].remote(0);
    let at = |offset| Remote { offset, ..good };
    let with_key = |key| Remote {
        key: Key(key),
        ..good
    };
    let refused = [
        (with_key(good.key.0 ^ 1 << 16), status::REFUSED_KEY),
        (with_key(good.key.0 + 1), status::REFUSED_KEY),
        (with_key(u32::MAX), status::REFUSED_KEY),
        (at(MEMORY as u64 - 7), status::REFUSED_BOUNDS),
        (at(u64::MAX), status::REFUSED_BOUNDS),
    ];
    for (to, expected) in refused {
        assert_eq!(put(&mut nodes, to), Status(expected), "{to:?}");
    }
    // Data inside, word outside.
    let operation = Operation::Write {
        to: good,
        data: Data::Inline(b"12345678"),
        word: Some((MEMORY as u64, 1)),
        notify: None,
    };
    assert_eq!(
        outcome(&mut nodes, operation),
        Status(status::REFUSED_BOUNDS)
    );
    let (a, b) = nodes.two();
    assert_eq!(b.region_bytes(0, MEMORY), vec![0; MEMORY]);
    assert_eq!(b.messages(), []);
    assert_eq!(
        (a.counters().refused_there, b.counters().refused_here),
        (6, 6)
    );
    // The lane goes on.
    assert_eq!(put(&mut nodes, at(MEMORY as u64 - 8)), Status::OK);
    assert_eq!(nodes.two().1.messages().len(), 1);
}

#[test]
fn rights_and_source_of_a_region_are_kept() {
    let mut nodes = Nodes::pair();
    let memory = Arc::new(nodes.nodes[1].rde.space().allocate(4096).unwrap());
    let register = |nodes: &Nodes, rights, source| {
        let view = Shared::new(&memory, 0, 4096).unwrap();
        nodes.nodes[1].rde.register(view, rights, source).unwrap()
    };
    let remote = |region: &Region| Remote {
        key: region.key(),
        offset: 0,
    };
    let into = [nodes.nodes[0].local.piece(0, 8).unwrap()];
    let cases = [
        (Rights::Write, Some(1), status::OK, status::REFUSED_RIGHTS),
        (Rights::Read, Some(1), status::REFUSED_RIGHTS, status::OK),
        (Rights::ReadWrite, None, status::OK, status::OK),
        (
            Rights::ReadWrite,
            Some(3),
            status::REFUSED_SOURCE,
            status::REFUSED_SOURCE,
        ),
    ];
    for (rights, source, write, read) in cases {
        let region = register(&nodes, rights, source);
        let to = remote(&region);
        assert_eq!(put(&mut nodes, to), Status(write), "{rights:?} {source:?}");
        let got = outcome(
            &mut nodes,
            Operation::Read {
                from: to,
                into: &into,
            },
        );
        assert_eq!(got, Status(read), "{rights:?} {source:?}");
        drop(region);
        assert_eq!(put(&mut nodes, to), Status(status::REFUSED_KEY));
    }
}

#[test]
fn a_key_is_not_good_for_the_next_use_of_its_entry() {
    let mut nodes = Nodes::pair();
    let memory = Arc::new(nodes.nodes[1].rde.space().allocate(4096).unwrap());
    let view = || Shared::new(&memory, 0, 4096).unwrap();
    let mut keys = Vec::new();
    for _ in 0..3000 {
        let region = nodes.nodes[1]
            .rde
            .register(view(), Rights::Write, None)
            .unwrap();
        assert!(!keys.contains(&region.key()));
        keys.push(region.key());
    }
    let key = keys[0];
    let to = Remote { key, offset: 0 };
    assert_eq!(put(&mut nodes, to), Status(status::REFUSED_KEY));
}

#[test]
fn a_node_that_is_no_peer_reaches_nothing() {
    let mut nodes = Nodes::pair();
    nodes.nodes[1].rde.management().join(2, &[3]);
    let to = nodes.nodes[1].remote(0);
    assert_eq!(put(&mut nodes, to), Status(status::REFUSED_SOURCE));
    nodes.nodes[0].set.send(2, 0, b"nor messages").unwrap();
    nodes.settle();
    let done = nodes.nodes[0].completions();
    assert_eq!((done.len(), done[0].window, done[0].tag), (1, true, 1));
    assert_eq!(done[0].status, Status(status::REFUSED_SOURCE));
    assert_eq!(nodes.two().1.messages(), []);
}

#[test]
fn memory_that_is_not_mapped_any_more_is_not_reached() {
    let mut nodes = Nodes::pair();
    let to = nodes.nodes[1].remote(0);
    let memory = Arc::new(nodes.nodes[0].rde.space().allocate(4096).unwrap());
    let piece = [Shared::new(&memory, 0, 4096).unwrap().piece(0, 64).unwrap()];
    drop(memory);
    let gone = write(to, Data::Pieces(&piece));
    assert_eq!(outcome(&mut nodes, gone), Status(status::LOCAL_ACCESS));
    assert_eq!(nodes.nodes[0].counters().dma_faults, 1);
    // The same at the target: a region whose memory is gone.
    let space = nodes.nodes[1].rde.space().clone();
    let memory = Arc::new(space.allocate(4096).unwrap());
    let past = Shared::new(&memory, 0, 4096).unwrap();
    let region = nodes.nodes[1]
        .rde
        .register(past, Rights::Write, None)
        .unwrap();
    let registers = nodes.nodes[1].rde.space().device().registers(0).unwrap();
    let entry = 0x10000 + u64::from(region.key().0 & 0xffff) * 64;
    registers.write64(entry + 0x10, 8192);
    let to = Remote {
        key: region.key(),
        offset: 4090,
    };
    assert_eq!(put(&mut nodes, to), Status(status::TARGET_ACCESS));
    assert_eq!(nodes.nodes[1].counters().dma_faults, 1);
    assert_eq!(nodes.two().1.messages(), []);
}

#[test]
fn what_the_device_cannot_do_is_not_posted() {
    let nodes = &mut Nodes::pair();
    let (a, b) = nodes.two();
    let to = b.remote(0);
    let piece = a.local.piece(0, 1).unwrap();
    let nothing = Data::Inline(&[]);
    let nine = [piece; 9];
    let cases = [
        work(0, 0, write(to, nothing)),
        work(1024, 0, write(to, nothing)),
        work(2, 0, write(to, Data::Inline(&[0; 129]))),
        work(2, 0, write(to, Data::Pieces(&nine))),
        work(
            2,
            0,
            Operation::Message(Notify {
                set: 0,
                payload: &[0; 49],
            }),
        ),
        work(
            2,
            0,
            Operation::Write {
                to,
                data: nothing,
                word: Some((4, 0)),
                notify: None,
            },
        ),
    ];
    for case in cases {
        let refused = a.set.post(&case);
        assert!(matches!(refused, Err(NotPosted::Invalid(_))), "{case:?}");
    }
    assert!(matches!(
        a.set.send(2, 0, &[0; 49]),
        Err(NotPosted::Invalid(_))
    ));
    assert_eq!((a.set.stats().posted, a.set.outstanding()), (0, 0));
}

/// A file as programs share their memory in: one that cannot shrink.
fn shared_file(len: u64) -> std::fs::File {
    use nix::fcntl::{FcntlArg, SealFlag, fcntl};
    use nix::sys::memfd::{MFdFlags, memfd_create};
    let file = memfd_create(c"test", MFdFlags::MFD_ALLOW_SEALING).unwrap();
    let file = std::fs::File::from(file);
    file.set_len(len).unwrap();
    fcntl(&file, FcntlArg::F_ADD_SEALS(SealFlag::F_SEAL_SHRINK)).unwrap();
    file
}

#[test]
fn of_a_window_only_what_is_mapped_can_be_reached() {
    let mut nodes = Nodes::pair();
    let file = shared_file(8192);
    let rde = &nodes.nodes[1].rde;
    let window = rde.space().window(1 << 20).unwrap();
    assert!(window.map_file(100, &file, 8192).is_err());
    assert!(window.map_file((1 << 20) - 4096, &file, 8192).is_err());
    let memory = window.map_file(65536, &file, 8192).unwrap();
    assert!(window.map_file(65536 + 4096, &file, 8192).is_err());
    let region = rde
        .register_window(&window, Rights::Write, Some(1))
        .unwrap();
    let to = |offset| Remote {
        key: region.key(),
        offset,
    };
    assert_eq!(put(&mut nodes, to(65536)), Status::OK);
    let mut bytes = [0; 8];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"12345678");
    assert_eq!(put(&mut nodes, to(0)), Status(status::TARGET_ACCESS));
    assert_eq!(put(&mut nodes, to(1 << 20)), Status(status::REFUSED_BOUNDS));
    drop(memory);
    assert_eq!(put(&mut nodes, to(65536)), Status(status::TARGET_ACCESS));
    let again = window.map_file(65536, &file, 4096).unwrap();
    assert_eq!(put(&mut nodes, to(65536)), Status::OK);
    drop((region, window, again));
}
