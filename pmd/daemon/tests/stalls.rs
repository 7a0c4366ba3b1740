//! The control thread never works for long at a time: whatever a user owns much of, ends at once, or changes while the
//! daemon looks, others are served meanwhile.

#[macro_use]
mod tenant;

use std::fs::File;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, FcntlArg, OFlag, fallocate, fcntl};
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, UnixAddr, connect, socket};
use nix::unistd::Pid;
use rdsock_shm::control::{Message, kind, question, request};
use rdsock_shm::layout::{ConnRecord, TenantMemory};
use tenant::actor::{ATTACKER, Actor, OTHER, Part, is_root, listen, say};
use tenant::measure::{Bystander, Honest};
use tenant::silent::{SilentFile, UnwrittenFile, be_file_system, with_file};
use tenant::{Answer, Daemon, Tenant, control_pair, tcp_pair};

const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";

/// How often a process attaches.
const TENANTS: usize = 3500;
/// Streams that end at once. All of their memory is used.
const STREAMS: u32 = 3000;
/// How often a tenant's memory is mapped by a process, and by how many.
const MAPPINGS: usize = 60_000;
const FORKS: usize = 8;

/// A turn of the control thread, in microseconds, that is too long.
const TURN: u64 = 50_000;
/// How long an attack is watched.
const WATCH: Duration = Duration::from_secs(5);

fn play(part: &Part) {
    match part.name.as_str() {
        "many tenants" => be_many_tenants(part),
        "many streams" => be_many_streams(part),
        "silent" => be_silent(part),
        "leaving files" => be_leaving_files(part),
        "leaving files beyond the share" => be_leaving_files_beyond_the_share(part),
        "handing over beyond the share" => be_handing_over_beyond_the_share(part),
        "full" => be_full(part),
        "file system" => be_file_system(part),
        "puncher" => be_puncher(part),
        "many groups" => be_in_many_groups(part),
        "pager" => be_pager(part),
        "watched" => be_watched(part),
        "often mapped" => be_often(part, map_often_and_end),
        other => panic!("no such part: {other}"),
    }
}

fn raise_descriptors() {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).unwrap();
}

/// Two attacks at once are more than this machine has to offer.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Attacks in a row that have to stall the daemon before they are believed to: one may fall into a time when the machine
/// has no core for it.
const ATTACKS: usize = 3;

/// An actor does something when it is told. Others are served meanwhile.
fn attack(test: &str, part: &str) {
    attack_by(test, part, ATTACKER);
}

fn attack_by(test: &str, part: &str, user: u32) {
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let stalled = (0..ATTACKS).map_while(|_| attack_once(test, part, user).err());
    let stalled: Vec<String> = stalled.collect();
    assert!(stalled.len() < ATTACKS, "each time: {stalled:?}");
}

fn attack_once(test: &str, part: &str, user: u32) -> Result<(), String> {
    let daemon = Daemon::start(SMALL);
    let mut honest = Honest::new(&daemon);
    let bystander = Bystander::new(&daemon);
    for _ in 0..20 {
        honest.promotion();
    }
    // A turn of fifty milliseconds is logged as too long. On a machine where such turns are usual, that says nothing.
    let most = TURN.max(20 * daemon.counter("longest_turn_us"));
    let mut actor = Actor::start(test, part, &daemon.socket(), user);
    while let Some(line) = actor.next_line(Duration::from_secs(120)) {
        println!(
            "{line}: longest turn so far {} us",
            daemon.counter("longest_turn_us")
        );
        if line == "ready" {
            break;
        }
    }
    actor.say("go");
    let end = Instant::now() + WATCH;
    let (mut longest, mut slowest) = (Duration::ZERO, Duration::ZERO);
    while Instant::now() < end {
        longest = longest.max(bystander.asks(&daemon, part));
        slowest = slowest.max(honest.promotion());
        std::thread::sleep(Duration::from_millis(2));
    }
    let turn = daemon.counter("longest_turn_us");
    let processor = daemon.counter("longest_turn_cpu_us");
    println!(
        "{part}: an answer after {longest:?} at most, a promotion after {slowest:?}, a turn of {turn} us, of {processor} us \
         of processor time"
    );
    if slowest >= bystander.most {
        return Err(format!("{slowest:?} for a promotion"));
    }
    if turn >= most {
        return Err(format!("a turn of {turn} us"));
    }
    Ok(())
}

/// Attached once more.
fn attach(part: &Part) -> Option<Tenant> {
    let mut more = Tenant::at(&part.socket)?;
    more.hello();
    matches!(more.receive(), Answer::Message(..)).then_some(more)
}

scene!(a_process_that_attaches_again_and_again, |test| {
    attack(test, "many tenants");
});

/// Attaches thousands of times, and then attaches and leaves as fast as it can.
fn be_many_tenants(part: &Part) {
    raise_descriptors();
    let mut held = Vec::new();
    while held.len() < TENANTS
        && let Some(more) = attach(part)
    {
        held.push(more);
    }
    say(&format!("{} attached", held.len()));
    say("ready");
    listen();
    std::thread::scope(|scope| {
        for _ in 0..16 {
            scope.spawn(|| {
                loop {
                    attach(part);
                }
            });
        }
    });
}

scene!(streams_that_end_at_once, |test| {
    attack(test, "many streams");
});

/// Makes thousands of streams, and ends.
fn be_many_streams(part: &Part) {
    raise_descriptors();
    let mut tenant = Tenant::attach_at(&part.socket);
    let mut pairs = Vec::new();
    for number in 0..STREAMS {
        let (connector, accepted) = tcp_pair();
        tenant.announce(2 * number, 1, &connector, 1);
        tenant.announce(2 * number + 1, 1, &accepted, 0);
        for _ in 0..2 {
            match tenant.receive() {
                Answer::Message(kind::PROMOTE, _, fds) => {
                    // All of it is used.
                    let map = memmap2::MmapOptions::new().map_raw(&fds[0]).unwrap();
                    for page in (0..map.len()).step_by(4096) {
                        // SAFETY: within the mapping; nobody else looks.
                        unsafe { map.as_mut_ptr().add(page).write_volatile(1) };
                    }
                }
                other => panic!("{other:?}"),
            }
        }
        pairs.push((connector, accepted));
    }
    say(&format!("{} streams", pairs.len()));
    say("ready");
    listen();
    nix::sys::signal::kill(nix::unistd::Pid::this(), nix::sys::signal::SIGKILL).unwrap();
}

/// Users who make porters wait for ever, and the descriptor with which each of them does.
fn silence(
    test: &str,
    daemon: &Daemon,
    users: std::ops::Range<u32>,
) -> Option<(Vec<Actor>, SilentFile)> {
    silence_by(test, "silent", daemon, users)
}

/// The same by users who play this part.
fn silence_by(
    test: &str,
    part: &str,
    daemon: &Daemon,
    users: std::ops::Range<u32>,
) -> Option<(Vec<Actor>, SilentFile)> {
    let start = |fd, user| {
        Actor::start_with(test, part, &daemon.socket(), |command| {
            command.uid(user).gid(user);
            // SAFETY: one system call between fork and exec.
            unsafe {
                command.pre_exec(move || match libc::dup2(fd, INHERITED) {
                    INHERITED => Ok(()),
                    _ => Err(std::io::Error::last_os_error()),
                })
            };
        })
    };
    let all = |fd| users.map(|user| start(fd, user)).collect();
    let (file, actors): (_, Vec<Actor>) = SilentFile::open_for(test, all)?;
    let (mut actors, file) = (actors, file);
    for actor in &mut actors {
        actor.say("go");
        actor.hear("ready");
    }
    Some((actors, file))
}

/// The silent file, in its actors.
const INHERITED: i32 = 100;

/// Has as many porters wait as it may; then calls and hangs up, as often as it is told.
fn be_silent(part: &Part) {
    listen();
    let mut held = Vec::new();
    for _ in 0..16 {
        let caller = Tenant::at(&part.socket).unwrap();
        caller.send(Message::empty(77).as_bytes(), &[INHERITED]);
        held.push(caller);
    }
    say("ready");
    let Some(times) = listen() else { return };
    call_in_vain(part, times.parse().unwrap());
    say("done");
    listen();
}

#[test]
fn one_user_whose_files_do_not_answer_keeps_no_caller_out() {
    let test = "one_user_whose_files_do_not_answer_keeps_no_caller_out";
    if let Some(part) = Part::of_this() {
        return play(&part);
    }
    if !is_root() {
        return;
    }
    let daemon = Daemon::start(SMALL);
    let bystander = Bystander::new(&daemon);
    // The file is dropped first: they do not end while they hold it.
    let Some((mut actors, _file)) = silence(test, &daemon, ATTACKER..ATTACKER + 1) else {
        return;
    };
    actors[0].say("4400");
    actors[0].hear("done");
    bystander.goes_on(&daemon, "one user's closes that wait", WATCH);
}

/// Connects to the daemon so often, and hangs up.
fn call_in_vain(part: &Part, times: u32) {
    let address = UnixAddr::new(&part.socket).unwrap();
    for _ in 0..times {
        let flags = SockFlag::SOCK_NONBLOCK;
        let caller = socket(AddressFamily::Unix, SockType::SeqPacket, flags, None).unwrap();
        if connect(caller.as_raw_fd(), &address).is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Files that callers leave in sockets which nobody reads, and the first of their descriptors.
const LEFT: i32 = 100;
/// Once its porters wait for these, the kernel may keep further ones away.
const TRIES: u32 = 3;
/// The share of a user, and files that one leaves who has it.
const SHARE: usize = 40;
const BEYOND: i32 = 300;
const FIRST: i32 = 600;

/// Calls in vain, so often that its callers are turned away, and has some of them leave a file.
fn be_leaving_files(part: &Part) {
    for fd in 0..LEFT {
        if fd % 10 == 0 {
            call_in_vain(part, 1500);
        }
        // Who is turned away before that has it still, and calls again.
        let leave = || {
            Tenant::at(&part.socket)
                .unwrap()
                .try_send(b"rubbish", &[FIRST + fd])
        };
        let _ = (0..TRIES).any(|_| leave().is_ok());
        // Where the daemon was quicker, it is this one that waits.
        std::thread::spawn(move || nix::unistd::close(FIRST + fd));
        // Not all of them in one turn of the daemon.
        std::thread::sleep(Duration::from_millis(2));
    }
    call_in_vain(part, 1500);
    say("done");
    listen();
}

/// An attacker who plays this part with so many sockets, in each of which such a file is in flight, and is done. The file is dropped
/// first: who holds one does not end before.
fn leave(test: &str, part: &str, daemon: &Daemon, count: i32) -> Option<(UnwrittenFile, Actor)> {
    let start = |path: &Path| {
        let sockets: Vec<OwnedFd> = (0..count).map(|_| with_file(path)).collect();
        Actor::start_with(test, part, &daemon.socket(), |command| {
            command.uid(ATTACKER).gid(ATTACKER);
            let inherited = move || {
                for (number, socket) in (FIRST..).zip(&sockets) {
                    // SAFETY: one system call between fork and exec.
                    if unsafe { libc::dup2(socket.as_raw_fd(), number) } != number {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            };
            // SAFETY: as above.
            unsafe { command.pre_exec(inherited) };
        })
    };
    let (file, actor) = UnwrittenFile::open_for(test, start)?;
    let done = actor.next_line(Duration::from_secs(60));
    assert_eq!(done.as_deref(), Some("done"));
    Some((file, actor))
}

/// The same by one whose user has its share of descriptors, and is turned away for that.
fn be_leaving_files_beyond_the_share(part: &Part) {
    let callers: Vec<_> = (0..SHARE).map(|_| Tenant::at(&part.socket)).collect();
    for fd in FIRST..FIRST + BEYOND {
        let caller = Tenant::at(&part.socket).unwrap();
        caller.send(b"rubbish", &[fd]);
        std::thread::spawn(move || nix::unistd::close(fd));
    }
    say("done");
    listen();
    drop(callers);
}

// What a user who has its share leaves behind is on an account as well.
scene!(
    files_of_a_user_who_has_its_share_do_not_take_all_descriptors,
    |test| {
        let daemon = Daemon::start(&format!("{SMALL}max_descriptors_per_user = {SHARE}\n"));
        let descriptors = || {
            let all = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
            all.count()
        };
        drop(Tenant::attach(&daemon));
        let before = descriptors();
        let Some(_leaving) = leave(test, "leaving files beyond the share", &daemon, BEYOND) else {
            return;
        };
        for _ in 0..5 {
            drop(Tenant::attach(&daemon));
        }
        // Its own, of all who have no room, and of those who are told so.
        let most = before + 2 * SHARE + 80;
        let now = descriptors();
        assert!(now < most, "{before}, then {now}");
    }
);

/// The same by one who hands sockets over, over one connection.
fn be_handing_over_beyond_the_share(part: &Part) {
    let tenant = Tenant::attach_at(&part.socket);
    let callers: Vec<_> = (0..SHARE).map(|_| Tenant::at(&part.socket)).collect();
    std::thread::sleep(Duration::from_millis(300));
    // Where the daemon takes no more, its socket is full.
    fcntl(&tenant.socket, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).unwrap();
    for fd in FIRST..FIRST + BEYOND {
        let (ours, theirs) = control_pair();
        Tenant::over(ours).send(b"rubbish", &[fd]);
        std::thread::spawn(move || nix::unistd::close(fd));
        tenant.send(
            Message::empty(kind::ADOPT).as_bytes(),
            &[theirs.as_raw_fd()],
        );
        // Where the daemon was quicker, it is this one that waits.
        std::thread::spawn(move || drop(theirs));
    }
    std::thread::sleep(Duration::from_millis(500));
    say("done");
    listen();
    drop(callers);
    std::process::abort();
}

scene!(
    sockets_that_are_handed_over_beyond_the_share_are_on_an_account,
    |test| {
        let daemon = Daemon::start(&format!("{SMALL}max_descriptors_per_user = {SHARE}\n"));
        let descriptors = || {
            let all = std::fs::read_dir(format!("/proc/{}/fd", daemon.pid())).unwrap();
            all.count()
        };
        drop(Tenant::attach(&daemon));
        let before = descriptors();
        let Some(_leaving) = leave(test, "handing over beyond the share", &daemon, BEYOND) else {
            return;
        };
        for _ in 0..5 {
            drop(Tenant::attach(&daemon));
        }
        let now = descriptors();
        // Those of who asks here, too.
        assert!(now < before + SHARE + 20, "{before}, then {now}");
    }
);

/// Messages that are none, full of descriptors.
fn be_full(part: &Part) {
    listen();
    let full = [INHERITED; 253];
    let send = |caller: &Tenant| caller.send(Message::empty(77).as_bytes(), &full);
    let held: Vec<_> = (0..8)
        .map(|_| Tenant::at(&part.socket).unwrap())
        .inspect(send)
        .collect();
    std::thread::sleep(Duration::from_millis(500));
    say("ready");
    listen();
    drop(held);
}

scene!(
    messages_full_of_files_that_do_not_answer_take_few_descriptors,
    |test| {
        let daemon = Daemon::start(SMALL);
        drop(Tenant::attach(&daemon));
        let before = daemon.descriptors();
        let silenced = silence_by(test, "full", &daemon, ATTACKER..ATTACKER + 1);
        let Some((_actors, _file)) = silenced else {
            return;
        };
        let now = daemon.descriptors();
        // Eight callers, with their processes, and two files each.
        assert!(now < before + 60, "{before}, then {now}");
    }
);

#[test]
fn files_in_sockets_that_nobody_reads_keep_no_caller_out() {
    let test = "files_in_sockets_that_nobody_reads_keep_no_caller_out";
    if let Some(part) = Part::of_this() {
        return play(&part);
    }
    if !is_root() {
        return;
    }
    let daemon = Daemon::start(SMALL);
    let mut honest = Honest::new(&daemon);
    let Some(_leaving) = leave(test, "leaving files", &daemon, LEFT) else {
        return;
    };
    for _ in 0..5 {
        drop(Tenant::attach(&daemon));
    }
    honest.promotion();
    assert!(daemon.counter("turned_away") > 100);
}

/// Who opens something waits for all cores where there is no room for it among the descriptors.
#[test]
fn there_is_room_for_all_descriptors_from_the_start() {
    let daemon = Daemon::start(SMALL);
    let number = |file: &str, name: &str| -> u64 {
        let text = std::fs::read_to_string(format!("/proc/{}/{file}", daemon.pid())).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        let word = line.unwrap().split_whitespace().next();
        word.unwrap().parse().unwrap()
    };
    let most = number("limits", "Max open files");
    let room = number("status", "FDSize:");
    assert!(room >= most.min(1 << 20), "room for {room} of {most}");
}

#[test]
fn eight_users_whose_files_do_not_answer_leave_a_porter() {
    let test = "eight_users_whose_files_do_not_answer_leave_a_porter";
    if let Some(part) = Part::of_this() {
        return play(&part);
    }
    if !is_root() {
        return;
    }
    let daemon = Daemon::start(SMALL);
    let mut honest = Honest::new(&daemon);
    let Some((_actors, _file)) = silence(test, &daemon, ATTACKER..ATTACKER + 8) else {
        return;
    };
    std::thread::sleep(Duration::from_millis(200));
    println!("{:?}", honest.promotion());
}

scene!(holes_in_the_memory_of_a_tenant, |test| {
    attack(test, "puncher");
});

scene!(memory_that_is_mapped_very_often_while_it_ends, |test| {
    attack(test, "often mapped");
});

/// Looks that have much to do: a process may be in 65,536 groups. In a user namespace of one's own it takes two groups that
/// one may map there; here root stands for that.
#[test]
fn looks_at_a_process_in_very_many_groups() {
    let test = "looks_at_a_process_in_very_many_groups";
    if let Some(part) = Part::of_this() {
        return play(&part);
    }
    if is_root() {
        attack_by(test, "many groups", 0);
    }
}

/// Is in as many groups as can be, others than when it attached, and announces connections.
fn be_in_many_groups(part: &Part) {
    const GROUPS: usize = 65_536;
    let join = |last: u32| {
        let mut groups = vec![ATTACKER; GROUPS];
        groups[GROUPS - 1] = OTHER;
        groups[..GROUPS - 1].fill(last);
        // SAFETY: the call reads that many numbers.
        let set = unsafe { libc::setgroups(groups.len(), groups.as_ptr()) };
        assert_eq!(set, 0);
    };
    join(ATTACKER);
    let mut tenants: Vec<_> = (0..8).map(|_| Tenant::attach_at(&part.socket)).collect();
    join(OTHER);
    let (connector, _accepted) = tcp_pair();
    say("ready");
    listen();
    for generation in 1.. {
        for tenant in &mut tenants {
            for number in 0..16 {
                tenant.announce(number, generation, &connector, 1);
            }
            while tenant.receive_within(Duration::ZERO).is_some() {}
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

scene!(
    records_that_are_paged_out_while_they_are_asked_for,
    |test| {
        attack(test, "pager");
    }
);

/// Has a page of its connection records paged out without end, and asks for them.
fn be_pager(part: &Part) {
    const RECORD: usize = 40_000;
    const ASKERS: usize = 7;
    let tenant = Tenant::attach_at(&part.socket);
    let file = tenant.memory.tenant.try_clone().unwrap();
    let at = (offset_of!(TenantMemory, conns) + RECORD * size_of::<ConnRecord>()) as u64;
    // Not through a mapping: a page that has two is left alone.
    let generation = at + offset_of!(ConnRecord, generation) as u64;
    file.write_all_at(&1u32.to_ne_bytes(), generation).unwrap();
    let page = at - at % 4096;
    map_often_at(&file, page, MAPPINGS);
    let mut options = memmap2::MmapOptions::new();
    let map = options.offset(page).len(4096).map_raw(&file).unwrap();
    say("ready");
    listen();
    std::thread::scope(|scope| {
        for _ in 0..ASKERS {
            scope.spawn(|| {
                loop {
                    Tenant::at(&part.socket).unwrap().ask(question::WHY);
                }
            });
        }
        loop {
            // SAFETY: within the mapping, which nobody refers to.
            unsafe {
                map.as_mut_ptr().write_volatile(1);
                libc::madvise(map.as_mut_ptr().cast(), 4096, libc::MADV_PAGEOUT);
            }
        }
    });
}

scene!(a_tenant_whose_socket_is_watched_very_often, |test| {
    attack(test, "watched");
});

/// Who sends to a socket, and who receives what was sent on it, wakes all that watch it.
fn be_watched(part: &Part) {
    // One message costs some milliseconds then, and 64 in one turn would be far too long.
    const DUPLICATES: usize = 400;
    const INSTANCES: usize = 120;
    raise_descriptors();
    let mut tenant = Tenant::attach_at(&part.socket);
    let duplicates: Vec<_> = (0..DUPLICATES)
        .map(|_| tenant.socket.try_clone().unwrap())
        .collect();
    let mut instances = Vec::new();
    for _ in 0..INSTANCES {
        let instance = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC).unwrap();
        for duplicate in &duplicates {
            let event = EpollEvent::new(EpollFlags::EPOLLIN, 0);
            instance.add(duplicate, event).unwrap();
        }
        instances.push(instance);
    }
    say("ready");
    listen();
    // Each is turned down with a message.
    let wrong = |number| rdsock_shm::control::Request {
        active: 7,
        ..tenant::request(request::ANNOUNCE, number, 1)
    };
    for number in (0..64).cycle() {
        tenant.ask_for(&wrong(number));
        while tenant.receive_within(Duration::ZERO).is_some() {}
    }
}

/// Maps memory many times over, in this process and in children, which are returned.
fn map_often(file: &File) -> Vec<Pid> {
    map_often_at(file, 0, MAPPINGS)
}

/// The same with a page somewhere in it, and so many mappings in each process.
fn map_often_at(file: &File, page: u64, mappings: usize) -> Vec<Pid> {
    for _ in 0..mappings {
        // SAFETY: a new mapping, that nobody uses.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                4096,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                page as i64,
            )
        };
        if at == libc::MAP_FAILED {
            break;
        }
    }
    let child = |_| {
        // SAFETY: the child makes two system calls.
        unsafe {
            let child = libc::fork();
            if child == 0 {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                loop {
                    libc::pause();
                }
            }
            Pid::from_raw(child)
        }
    };
    (0..FORKS).map(child).collect()
}

/// A hole where the queue is.
fn punch(file: &File) -> nix::Result<()> {
    let how = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, how, 0, 1 << 20)
}

/// Maps its memory many times over, and makes holes in it without end, while the daemon reads its queue.
fn be_puncher(part: &Part) {
    let tenant = Tenant::attach_at(&part.socket);
    let file = &tenant.memory.tenant;
    map_often(file);
    say("ready");
    listen();
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                loop {
                    let _ = punch(file);
                }
            });
        }
        loop {
            tenant.kick();
        }
    });
}

/// Does something again and again, with ever new memory.
fn be_often(part: &Part, what: fn(&Part)) {
    say("ready");
    listen();
    loop {
        // In a process of its own, so that its mappings are gone afterwards.
        // SAFETY: no other thread is there, so the child may do what it likes.
        match unsafe { libc::fork() } {
            0 => {
                what(part);
                std::process::exit(0);
            }
            child => {
                let _ = nix::sys::wait::waitpid(Pid::from_raw(child), None);
            }
        }
    }
}

fn end_all(children: Vec<Pid>) {
    for child in children {
        let _ = nix::sys::signal::kill(child, nix::sys::signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(child, None);
    }
}

/// Attaches several times, maps each memory very often, has its pages paged out, collapsed and made holes in without end, and ends:
/// the daemon unmaps them meanwhile.
fn map_often_and_end(part: &Part) {
    const MEMORIES: usize = 4;
    let mut tenants: Vec<_> = (0..MEMORIES)
        .map(|_| Tenant::attach_at(&part.socket))
        .collect();
    let mut children = Vec::new();
    for tenant in &tenants {
        let file = &tenant.memory.tenant;
        children.extend(map_often_at(file, 0, MAPPINGS / MEMORIES));
    }
    for tenant in &tenants {
        let file = tenant.memory.tenant.try_clone().unwrap();
        std::thread::spawn(move || {
            let map = memmap2::MmapOptions::new().map_raw(&file).unwrap();
            loop {
                let _ = punch(&file);
                for advice in [libc::MADV_PAGEOUT, libc::MADV_COLLAPSE, libc::MADV_REMOVE] {
                    // SAFETY: a mapping of this function's own, that nobody refers to.
                    unsafe { libc::madvise(map.as_mut_ptr().cast(), map.len(), advice) };
                }
            }
        });
    }
    for tenant in &tenants {
        tenant.kick();
    }
    std::thread::sleep(Duration::from_millis(200));
    tenants.clear();
    // The daemon needs porters just then.
    let callers: Vec<_> = (0..8).filter_map(|_| attach(part)).collect();
    drop(callers);
    end_all(children);
}
