//! Models that are linked through a directory, in one process: each on a fabric of its own. Links are made again when
//! they are gone, and nothing in the directory that no node has made keeps them from it.

use rdsock_model::{Chaos, Fabric};
use rdsock_rde::{Operation, QueueSet, Rde, Sizes, Work};
use rdsock_vfio::Space;
use rdsock_vfio::link::LinkError;
use rdsock_vfio::model::ModelDevice;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(30);

struct Node {
    id: u16,
    fabric: Fabric,
    _rde: Rde,
    set: QueueSet,
    start: Instant,
}

fn linked(dir: &Path, id: u16) -> Node {
    let fabric = Fabric::new(Chaos::default());
    let device = ModelDevice::linked(&fabric, dir, id, 1).unwrap();
    let rde = Rde::open(Space::new(Arc::new(device))).unwrap();
    rde.management()
        .set_stall_timeout(Duration::from_millis(20));
    rde.management().join(id, &[1, 2, 3]);
    let set = rde.queue_set(0, Sizes::default()).unwrap();
    Node {
        id,
        fabric,
        _rde: rde,
        set,
        start: Instant::now(),
    }
}

impl Node {
    /// Lets the device work; the last byte of each message that has come.
    fn turn(&mut self) -> Vec<u8> {
        self.fabric.step(self.start.elapsed().as_nanos() as u64);
        self.set.poll_completions(64, |_| {}).unwrap();
        let mut came = Vec::new();
        let take = |message: &rdsock_rde::Message| came.push(message.payload[47]);
        self.set.poll_messages(64, take).unwrap();
        came
    }

    fn say(&mut self, to: u16, byte: u8) {
        // A lane that has failed goes on. If there is no room, who waits tries again.
        let resume = Work {
            target: to,
            operation: Operation::Resume,
            tag: 0,
            report: false,
        };
        let _ = self.set.post(&resume);
        self.set.ring();
        let _ = self.set.send(to, 0, &[byte; 48]);
    }
}

/// Waits until each hears the other.
fn meet(a: &mut Node, b: &mut Node) {
    let end = Instant::now() + LIMIT;
    let (mut heard_a, mut heard_b) = (false, false);
    while !(heard_a && heard_b) {
        assert!(Instant::now() < end, "heard: {heard_a} {heard_b}");
        a.say(b.id, 1);
        b.say(a.id, 2);
        let turn_end = Instant::now() + Duration::from_millis(10);
        while Instant::now() < turn_end {
            heard_a |= a.turn().contains(&2);
            heard_b |= b.turn().contains(&1);
            std::thread::sleep(Duration::from_micros(500));
        }
    }
}

fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), PermissionsExt::from_mode(0o700)).unwrap();
    folder
}

#[test]
fn what_is_missing_of_a_place_is_made_anew() {
    let folder = folder();
    let dir = folder.path().join("fabric");
    let (mut a, mut b) = (linked(&dir, 1), linked(&dir, 2));
    meet(&mut a, &mut b);
    for lost in ["1.sock", "1.lock"] {
        std::fs::remove_file(dir.join(lost)).unwrap();
        drop(b);
        b = linked(&dir, 2);
        meet(&mut a, &mut b);
        let end = Instant::now() + LIMIT;
        while !dir.join(lost).exists() {
            assert!(Instant::now() < end, "{lost} is not made anew");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
    std::fs::remove_dir_all(&dir).unwrap();
    let mut c = linked(&dir, 3);
    meet(&mut a, &mut c);
    meet(&mut b, &mut c);
    meet(&mut a, &mut b);
}

#[test]
fn an_id_belongs_to_one_process_after_the_directory_was_deleted_too() {
    let folder = folder();
    let dir = folder.path().join("fabric");
    let _a = linked(&dir, 1);
    std::fs::remove_dir_all(&dir).unwrap();
    let end = Instant::now() + LIMIT;
    while !dir.join("1.sock").exists() {
        assert!(Instant::now() < end, "the place is not made anew");
        std::thread::sleep(Duration::from_millis(10));
    }
    let fabric = Fabric::new(Chaos::default());
    let taken = ModelDevice::linked(&fabric, &dir, 1, 1).unwrap_err();
    assert!(matches!(taken, LinkError::Taken { id: 1, .. }), "{taken}");
}

#[test]
fn what_no_node_has_made_is_not_followed_or_removed() {
    for name in ["1.sock", "1.lock"] {
        let folder = folder();
        let outside = folder.path().join("outside");
        std::fs::write(&outside, "precious").unwrap();
        let dir = folder.path().join("fabric");
        std::fs::create_dir(&dir).unwrap();
        std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o700)).unwrap();
        let place = dir.join(name);
        symlink(&outside, &place).unwrap();
        let fabric = Fabric::new(Chaos::default());
        let refused = ModelDevice::linked(&fabric, &dir, 1, 1).unwrap_err();
        assert!(matches!(refused, LinkError::Foreign { .. }), "{refused}");
        assert!(refused.to_string().contains(name), "{refused}");
        assert!(place.is_symlink());
        std::fs::remove_file(&place).unwrap();
        std::fs::create_dir(&place).unwrap();
        let refused = ModelDevice::linked(&fabric, &dir, 1, 1).unwrap_err();
        assert!(matches!(refused, LinkError::Foreign { .. }), "{refused}");
        assert_eq!(std::fs::read_to_string(&outside).unwrap(), "precious");
    }
    let folder = folder();
    let dir = folder.path().join("fabric");
    symlink(folder.path(), &dir).unwrap();
    let fabric = Fabric::new(Chaos::default());
    let refused = ModelDevice::linked(&fabric, &dir, 1, 1).unwrap_err();
    assert!(matches!(refused, LinkError::Open { .. }), "{refused}");
}
