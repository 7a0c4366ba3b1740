use super::files::{Kind, Mount, group_in, limit_of};
use super::*;
use proptest::prelude::*;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;

const MB: u64 = 1 << 20;
const NOTHING: [u64; 0] = [];

/// A tree of groups that is made of folders, with limits in them.
struct Tree {
    folder: tempfile::TempDir,
    kind: Kind,
}

impl Tree {
    fn new(kind: Kind) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Tree { folder, kind }
    }

    fn put(&self, group: impl AsRef<Path>, file: &str, text: impl AsRef<[u8]>) {
        let folder = self.folder.path().join(group);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(file), text).unwrap();
    }

    fn mount(&self, root: &str) -> Mount {
        Mount::new(self.kind, root, self.folder.path())
    }

    fn groups(&self, root: &str) -> Cgroups {
        Cgroups::at(vec![self.mount(root)])
    }
}

fn limits(group: &Option<Arc<Cgroup>>) -> Vec<u64> {
    let levels = group.iter().flat_map(Cgroup::limited);
    levels.map(|level| level.view().limit).collect()
}

#[test]
fn memory_is_counted_where_its_controller_is() {
    let path = |path: &'static str| Path::new(path);
    let second = b"0::/user.slice/a.scope\n";
    assert_eq!(
        group_in(second),
        Some((Kind::Second, path("/user.slice/a.scope")))
    );
    let first = b"9:name=systemd:/x\n5:cpuset:/y\n4:cpu,memory:/m:n\n0::/z\n";
    assert_eq!(group_in(first), Some((Kind::First, path("/m:n"))));
    // A tree with a name of its own limits nothing.
    let named = b"9:name=memory:/x\n0::/z\n";
    assert_eq!(group_in(named), Some((Kind::Second, path("/z"))));
    for nothing in [
        &b""[..],
        b"\n\n",
        b"0::",
        b"memory",
        b"1:cpu:/a\n",
        b"0:cpu:/a",
    ] {
        let found = group_in(nothing);
        assert!(
            found.is_none_or(|(_, path)| path == Path::new("")),
            "{nothing:?}"
        );
    }
}

#[test]
fn mounts_are_read_as_the_kernel_writes_them() {
    let mountinfo = b"\
        31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755\n\
        35 31 0:32 /docker/7 /with\\040blank/memory rw - cgroup cgroup rw,memory\n\
        36 31 0:32 / /sys/fs/cgroup/memory rw,nosuid shared:9 master:2 - cgroup cgroup rw,cpu,memory\n\
        40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=memory\n\
        41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n\
        42 31 0:38 / /short\n\
        \n";
    let expected = [
        Mount::new(Kind::First, "/", "/sys/fs/cgroup/memory"),
        Mount::new(Kind::Second, "/", "/sys/fs/cgroup/unified"),
        Mount::new(Kind::First, "/docker/7", "/with blank/memory"),
    ];
    assert_eq!(Mount::all_in(mountinfo), expected);
}

#[test]
fn all_limits_above_a_process_count() {
    let tree = Tree::new(Kind::Second);
    tree.put("", "memory.max", "900\n");
    tree.put("a", "memory.max", "max\n");
    tree.put("a/b", "memory.max", "500\n");
    tree.put("a/b", "memory.high", "400\n");
    // Nothing in a group without the controller.
    fs::create_dir_all(tree.folder.path().join("a/b/c")).unwrap();
    let groups = tree.groups("/");
    assert_eq!(limits(&groups.named(b"0::/a/b/c\n")), [400, 900]);
    assert_eq!(limits(&groups.named(b"0::/a\n")), [900]);
    assert_eq!(limits(&groups.named(b"0::/\n")), [900]);
    // A group that has gone is in those above it all the same.
    assert_eq!(
        limits(&groups.named(b"0::/a/b/gone (deleted)\n")),
        [400, 900]
    );
    // Each is one, whoever is in there.
    let [b, c] = [&b"0::/a/b"[..], b"0::/a/b/c"].map(|text| groups.named(text).unwrap());
    assert!(Arc::ptr_eq(&b, c.above.as_ref().unwrap()));
}

#[test]
fn limits_of_the_first_kind() {
    let tree = Tree::new(Kind::First);
    tree.put("", "memory.limit_in_bytes", "9223372036854771712\n");
    tree.put("a", "memory.limit_in_bytes", "157286400\n");
    let groups = tree.groups("/");
    let hybrid = b"4:memory:/a\n1:cpu:/\n0::/b\n";
    assert_eq!(limits(&groups.named(hybrid)), [150 * MB]);
    // Of a kind that is not mounted.
    assert_eq!(limits(&groups.named(b"0::/a\n")), NOTHING);
}

#[test]
fn a_daemon_in_a_container_sees_its_own_part() {
    let tree = Tree::new(Kind::Second);
    tree.put("", "memory.max", "900");
    tree.put("a", "memory.max", "500");
    // The part is mounted, and processes are named from the top.
    let groups = tree.groups("/docker/7");
    assert_eq!(limits(&groups.named(b"0::/docker/7/a\n")), [500, 900]);
    assert_eq!(limits(&groups.named(b"0::/docker/77/a\n")), NOTHING);
    // A namespace of its own: what is outside is named by the way there.
    let groups = tree.groups("/");
    for outside in [
        &b"0::/../a\n"[..],
        b"0::/..\n",
        b"0::/a/../../a\n",
        b"0::a\n",
    ] {
        assert_eq!(limits(&groups.named(outside)), NOTHING, "{outside:?}");
    }
}

#[test]
fn names_are_what_their_makers_like() {
    let tree = Tree::new(Kind::Second);
    for name in [
        &b"a:b"[..],
        b" ",
        b"\\040",
        b"\xff\xfe",
        b"...",
        b"max",
        b"x (deleted)",
    ] {
        tree.put(OsStr::from_bytes(name), "memory.max", "500");
        let groups = tree.groups("/");
        let text = [b"0::/", name, b"\n"].concat();
        let found = groups.named(&text);
        assert_eq!(limits(&found), [500], "{name:?}");
        // It can be told to people.
        serde_json::to_string(&found.unwrap().view()).unwrap();
    }
    // Very deep: those at the top count.
    let deep = "d/".repeat(500);
    tree.put("d", "memory.max", "700");
    tree.put(&deep, "memory.max", "1");
    let found = tree.groups("/").named(format!("0::/{deep}").as_bytes());
    assert_eq!(limits(&found), [700]);
    assert_eq!(found.iter().flat_map(Cgroup::levels).count(), LEVELS);
}

#[test]
fn what_is_no_limit_changes_nothing() {
    let tree = Tree::new(Kind::Second);
    tree.put("a", "memory.max", "500");
    let folder = tree.folder.path().join("a");
    let groups = tree.groups("/");
    let group = groups.named(b"0::/a").unwrap();
    for nonsense in [
        &b""[..],
        b"-1",
        b"500 600",
        b"18446744073709551616",
        b"\xff",
        &[b'1'; 9000],
    ] {
        tree.put("a", "memory.max", nonsense);
        assert!(limit_of(Kind::Second, &folder).is_err(), "{nonsense:?}");
        *group.read.lock().unwrap() = None;
        groups.named(b"0::/a");
        assert_eq!(group.view().limit, 500);
    }
    fs::remove_file(folder.join("memory.max")).unwrap();
    assert_eq!(limit_of(Kind::Second, &folder).unwrap(), None);
    assert_eq!(limit_of(Kind::Second, Path::new("/nowhere")).unwrap(), None);
}

#[test]
fn a_limit_is_read_again_after_a_while() {
    let tree = Tree::new(Kind::Second);
    tree.put("a", "memory.max", "500");
    let groups = tree.groups("/");
    let group = groups.named(b"0::/a").unwrap();
    tree.put("a", "memory.max", "600");
    groups.named(b"0::/a");
    assert_eq!(group.view().limit, 500, "not at once");
    *group.read.lock().unwrap() = Some(Instant::now() - BELIEVED);
    groups.named(b"0::/a");
    assert_eq!(group.view().limit, 600);
}

#[test]
fn groups_that_nobody_is_in_are_forgotten() {
    let groups = Tree::new(Kind::Second).groups("/");
    let kept = groups.named(b"0::/kept/0").unwrap();
    for number in 0..4 * REMEMBERED {
        groups.named(format!("0::/{number}").as_bytes());
    }
    let known = groups.known.lock().unwrap();
    assert!(known.groups.len() <= REMEMBERED + 8);
    assert!(known.groups.values().any(|group| Arc::ptr_eq(group, &kept)));
}

/// A group with this limit, below another one.
fn group(limit: u64, above: Option<&Arc<Cgroup>>) -> Arc<Cgroup> {
    let group = Cgroup::new(PathBuf::from("/"), above.cloned());
    group.limit.store(limit, Ordering::Relaxed);
    Arc::new(group)
}

const RULE: Rule = Rule {
    percent: 25,
    largest: 4 * MB,
    smallest: SMALLEST,
};

fn seat(group: &Arc<Cgroup>) -> Seat<'_> {
    Seat {
        group: Some(group),
        both: false,
    }
}

#[test]
fn rings_without_limits_are_as_large_as_configured() {
    let free = group(NO_LIMIT, None);
    let nobody = Seat {
        group: None,
        both: true,
    };
    let (size, rings) = RULE.take([seat(&free), nobody]).unwrap();
    assert!(size == 4 * MB && rings.are_free());
    assert_eq!(free.view().rings, 0);
}

#[test]
fn each_end_pays_for_the_ring_that_it_writes() {
    let (free, server) = (group(NO_LIMIT, None), group(1024 * MB, None));
    let (size, rings) = RULE.take([seat(&free), seat(&server)]).unwrap();
    assert_eq!((size, server.view().rings), (4 * MB, 4 * MB));
    // For both, where the other end is a stranger's, and where both ends are its own.
    let wary = Seat {
        both: true,
        ..seat(&server)
    };
    let strangers = RULE.take([seat(&free), wary]).unwrap().1;
    assert_eq!(server.view().rings, 12 * MB);
    let own = RULE.take([seat(&server), wary]).unwrap().1;
    assert_eq!(server.view().rings, 20 * MB);
    drop((rings, strangers, own));
    assert_eq!(server.view().rings, 0);
}

#[test]
fn a_limit_above_both_ends_counts_for_both() {
    let above = group(256 * MB, None);
    let ends = [
        group(1024 * MB, Some(&above)),
        group(NO_LIMIT, Some(&above)),
    ];
    let (size, _rings) = RULE.take([seat(&ends[0]), seat(&ends[1])]).unwrap();
    // A sixteenth of 64 MB for two.
    assert_eq!(size, 2 * MB);
    assert_eq!((above.view().rings, ends[0].view().rings), (4 * MB, 2 * MB));
}

#[test]
fn a_hundred_clients_get_what_is_there() {
    let (client, server) = (group(NO_LIMIT, None), group(150 * MB, None));
    let mut kept = Vec::new();
    let mut before = u64::MAX;
    while let Ok((size, rings)) = RULE.take([seat(&client), seat(&server)]) {
        assert!(size.is_power_of_two() && (SMALLEST..=before).contains(&size));
        before = size;
        kept.push(rings);
    }
    let share = 150 * MB / 4;
    assert!(kept.len() > 90, "{} streams", kept.len());
    assert!((share - SMALLEST..=share).contains(&server.view().rings));
    assert_eq!(server.view().refused, 1);
    drop(kept);
    assert_eq!(server.view().rings, 0);
}

#[test]
fn what_is_left_of_a_smaller_limit_may_be_nothing() {
    let (client, server) = (group(NO_LIMIT, None), group(150 * MB, None));
    let (_, rings) = RULE.take([seat(&client), seat(&server)]).unwrap();
    server.limit.store(MB, Ordering::Relaxed);
    assert_eq!(RULE.take([seat(&client), seat(&server)]).unwrap_err(), Full);
    drop(rings);
    let none = Rule { percent: 0, ..RULE };
    assert_eq!(none.take([seat(&client), seat(&server)]).unwrap_err(), Full);
    // Rings that are configured to be smaller are as small.
    let small = Rule {
        largest: 4096,
        ..RULE
    };
    assert_eq!(small.take([seat(&client), seat(&server)]).unwrap().0, 4096);
}

proptest! {
    /// Never over a share, and all is given back.
    #[test]
    fn sums_are_those_of_the_rings(
        limits in prop::collection::vec(prop_oneof![Just(NO_LIMIT), 0..1024 * MB, 0..u64::MAX], 6),
        percent in 0..=100u64,
        largest in 12..30u32,
        steps in prop::collection::vec((0usize..6, 0usize..6, any::<bool>(), any::<bool>(), 0usize..8), 1..200),
    ) {
        // A tree: each is below the one of half its number.
        let mut groups: Vec<Arc<Cgroup>> = Vec::new();
        for (at, limit) in limits.iter().enumerate() {
            let above = (at > 0).then(|| groups[at / 2].clone());
            groups.push(group(*limit, above.as_ref()));
        }
        let rule = Rule { percent, largest: 1 << largest, smallest: SMALLEST };
        let mut kept = Vec::new();
        for (a, b, both, of_first, drops) in steps {
            if drops == 0 && !kept.is_empty() {
                kept.swap_remove(a % kept.len());
            }
            let seats = [(a, both && of_first), (b, both)];
            let seats = seats.map(|(at, both)| Seat { group: Some(&groups[at]), both });
            if let Ok((size, rings)) = rule.take(seats) {
                prop_assert!(size.is_power_of_two() && size <= rule.largest);
                prop_assert!(size >= SMALLEST.min(rule.largest));
                kept.push(rings);
            }
            for group in &groups {
                let sum = kept.iter().flat_map(|rings: &Rings| &rings.taken);
                let own = sum.filter(|(of, _)| Arc::ptr_eq(of, group));
                let sum: u64 = own.map(|(_, bytes)| bytes).sum();
                let view = group.view();
                prop_assert_eq!(view.rings, sum);
                let share = (u128::from(view.limit) * u128::from(percent) / 100) as u64;
                prop_assert!(view.limit == NO_LIMIT || sum <= share);
            }
        }
        drop(kept);
        prop_assert!(groups.iter().all(|group| group.view().rings == 0));
    }

    /// Whatever the kernel's files hold, nothing panics, and no folder outside of the mount is named.
    #[test]
    fn any_text_names_a_group_below_the_mount_or_none(
        text in prop::collection::vec(prop_oneof![Just(b':'), Just(b'/'), Just(b'.'), Just(b'\n'), Just(b'0'), any::<u8>()], 0..80),
        in_front in prop_oneof![Just(""), Just("0::"), Just("4:memory:/")],
    ) {
        let text = [in_front.as_bytes(), &text].concat();
        Mount::all_in(&text);
        if let Some((kind, path)) = group_in(&text) {
            let mount = Mount::new(kind, "/", "/mount");
            if let Some(folder) = mount.folder_of(path) {
                prop_assert!(folder.starts_with("/mount"));
                let up = |part: std::path::Component| part == std::path::Component::ParentDir;
                prop_assert!(!folder.components().any(up));
            }
        }
    }
}
