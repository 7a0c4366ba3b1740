//! Nobody gets the connection of a program that runs with other rights than its own: not by having been
//! its process before, nor by holding what that process had.

#[macro_use]
mod tenant;

use std::net::{TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::Signal;
use serde_json::Value;
use tenant::actor::{ATTACKER, Actor, Part, VICTIM, is_root, say};
use tenant::measure::{Bystander, Honest};
use tenant::owner::{CAPABLE, be_connected, be_owner, be_tenant, keep_only_change_of_user};
use tenant::silent::{FileSystem, be_file_system};
use tenant::victim::{Program, Rights};
use tenant::{Daemon, Tenant};

const SMALL: &str = "ring_size = 65536\nhuge_pages = \"never\"\n";

/// What the test does is a scene of three: a process that attaches and forks (`owner`), which then
/// becomes somebody else and connects; its child, which still has the control socket and the queue; and an
/// honest server.
struct Scene {
    daemon: Daemon,
    server: Tenant,
    listener: TcpListener,
    before: Value,
}

impl Scene {
    fn new() -> Self {
        let daemon = Daemon::start(SMALL);
        Scene {
            server: Tenant::attach(&daemon),
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            before: daemon.stat(),
            daemon,
        }
    }

    fn port(&self) -> u16 {
        self.listener.local_addr().unwrap().port()
    }

    fn start(&self, test: &str, user: u32) -> Actor {
        let socket = self.daemon.socket();
        match user {
            CAPABLE => Actor::start_with(test, "owner", &socket, |command| {
                // SAFETY: system calls alone between fork and exec.
                unsafe { command.pre_exec(keep_only_change_of_user) };
            }),
            user => Actor::start(test, "owner", &socket, user),
        }
    }

    /// An owner that follows this plan, as far as its connection. What it says of that.
    fn owner(&self, test: &str, user: u32, plan: &str) -> (Actor, Vec<u64>, TcpStream) {
        self.owner_with(test, user, plan, || {})
    }

    /// The same with something done when it is connected, before the daemon reads on.
    fn owner_with(
        &self,
        test: &str,
        user: u32,
        plan: &str,
        connected: impl FnOnce(),
    ) -> (Actor, Vec<u64>, TcpStream) {
        let mut owner = self.start(test, user);
        let unread = plan.starts_with("unread");
        let late = unread || plan.starts_with("late");
        if unread {
            self.daemon.signal(Signal::SIGSTOP);
        }
        owner.say(plan);
        if late && !unread {
            owner.hear("greeted");
            self.daemon.signal(Signal::SIGSTOP);
            owner.say("go");
        }
        let connection = owner.hear_numbers("connected");
        let (accepted, _) = self.listener.accept().unwrap();
        connected();
        if late {
            self.daemon.signal(Signal::SIGCONT);
            // Now it reads who called.
            std::thread::sleep(Duration::from_millis(300));
        }
        (owner, connection, accepted)
    }

    /// The child announces the connection, before or behind the server. What it was answered.
    fn announce_by_child(
        &mut self,
        owner: &mut Actor,
        connection: &[u64],
        accepted: &TcpStream,
        server_first: bool,
    ) -> String {
        let words: Vec<String> = connection.iter().map(u64::to_string).collect();
        if server_first {
            self.server.announce(1, 1, accepted, 0);
            self.daemon
                .wait_until("announced", |stat| stat["waiting_now"] == 1);
        }
        owner.say(&format!("announce {}", words.join(" ")));
        owner.hear("announced");
        if !server_first {
            std::thread::sleep(Duration::from_millis(300));
            self.server.announce(1, 1, accepted, 0);
        }
        owner.hear("answer")
    }

    /// It was counted by some name that is none of everyday life.
    fn was_counted(&self) -> bool {
        const EVERYDAY: [&str; 6] = [
            "announced",
            "attached",
            "questions",
            "streams_opened",
            "streams_closed",
            "streams_huge",
        ];
        let now = self.daemon.stat();
        let counters = now["counters"].as_object().unwrap();
        let mut others = counters
            .iter()
            .filter(|(name, _)| !EVERYDAY.contains(&name.as_str()));
        others.any(|(name, count)| count.as_u64() > self.before["counters"][name].as_u64())
    }
}

/// The child of an owner that follows this plan is given nothing.
fn child_gets_nothing(test: &str, user: u32, plan: impl Fn(u16) -> String) {
    for server_first in [true, false] {
        let mut scene = Scene::new();
        let (mut owner, connection, accepted) = scene.owner(test, user, &plan(scene.port()));
        let answer = scene.announce_by_child(&mut owner, &connection, &accepted, server_first);
        println!("server first: {server_first}; the child was answered {answer}");
        assert!(
            !answer.contains("PROMOTE"),
            "the child of {} has the connection of a program that runs as user {} and group {}; \
             it was answered {answer}",
            user,
            connection[5],
            connection[6]
        );
        assert!(scene.was_counted(), "{answer}: {:#}", scene.daemon.stat());
        drop(owner);
        Honest::new(&scene.daemon).promotion();
    }
}

/// An owner that runs this program.
fn program_keeps_its_connection(test: &str, rights: Rights, more: &str) {
    let program = Program::with(rights);
    let path = program.path().display().to_string();
    child_gets_nothing(test, ATTACKER, |port| format!("exec {path} {port} {more}"));
}

scene!(a_set_user_id_program_keeps_its_connection, |test| {
    program_keeps_its_connection(test, Rights::SetUserId, "");
});

scene!(a_set_group_id_program_keeps_its_connection, |test| {
    program_keeps_its_connection(test, Rights::SetGroupId, "");
});

scene!(a_program_with_capabilities_keeps_its_connection, |test| {
    program_keeps_its_connection(test, Rights::Capability, "");
});

scene!(
    a_program_that_hides_its_memory_keeps_its_connection,
    |test| {
        program_keeps_its_connection(test, Rights::Nothing, "undumpable");
    }
);

// Its user may look into it anyway: what counts is that nothing of a process stays behind an exec.
scene!(
    another_program_of_the_same_user_keeps_its_connection,
    |test| {
        program_keeps_its_connection(test, Rights::Nothing, "");
    }
);

scene!(the_same_program_again_keeps_its_connection, |test| {
    child_gets_nothing(test, ATTACKER, |port| format!("again {port}"));
});

scene!(
    who_hides_its_memory_without_exec_keeps_its_connection,
    |test| {
        child_gets_nothing(test, ATTACKER, |port| format!("hide {port}"));
    }
);

scene!(who_was_root_when_it_attached_keeps_its_connection, |test| {
    child_gets_nothing(test, 0, |port| format!("setuid {port}"));
});

scene!(who_may_change_its_user_keeps_its_connection, |test| {
    child_gets_nothing(test, CAPABLE, |port| format!("setuid {port}"));
});

/// It has said that it has mapped its memory as somebody else than it is when the daemon reads that.
fn late_look(test: &str, rights: Rights, more: &str) {
    let program = Program::with(rights);
    let path = program.path().display().to_string();
    child_gets_nothing(test, ATTACKER, |port| {
        format!("late exec {path} {port} {more}")
    });
}

scene!(a_late_look_sees_a_set_user_id_program, |test| {
    late_look(test, Rights::SetUserId, "");
});

scene!(a_late_look_sees_a_set_group_id_program, |test| {
    late_look(test, Rights::SetGroupId, "");
});

scene!(a_late_look_sees_a_program_with_capabilities, |test| {
    late_look(test, Rights::Capability, "");
});

scene!(a_late_look_sees_a_program_that_hides_its_memory, |test| {
    late_look(test, Rights::Nothing, "undumpable");
});

scene!(
    a_child_does_not_map_the_memory_for_a_set_user_id_program,
    |test| {
        let program = Program::with(Rights::SetUserId);
        let path = program.path().display().to_string();
        child_gets_nothing(test, ATTACKER, |port| format!("unread exec {path} {port} "));
    }
);

scene!(exec_into_a_set_user_id_program_detaches, |test| {
    let program = Program::with(Rights::SetUserId);
    let scene = Scene::new();
    let plan = format!("exec {} {}", program.path().display(), scene.port());
    let (mut owner, _connection, _accepted) = scene.owner(test, ATTACKER, &plan);
    // The daemon may need a message to notice.
    owner.say("kick");
    owner.hear("kicked");
    let pid = owner.pid();
    scene
        .daemon
        .wait_until("the program's process is no tenant", |stat| {
            let tenants = stat["tenants"].as_array().unwrap();
            tenants.iter().all(|tenant| tenant["pid"] != pid)
        });
});

scene!(
    nothing_else_is_done_for_the_child_of_another_program,
    |test| {
        let program = Program::with(Rights::SetUserId);
        let scene = Scene::new();
        let plan = format!("exec {} {}", program.path().display(), scene.port());
        let (mut owner, connection, _accepted) = scene.owner(test, ATTACKER, &plan);
        let words: Vec<String> = connection.iter().map(u64::to_string).collect();
        let before = scene.daemon.stat();
        for what in ["lookup", "holds", "mapped", "listens", "declined", "adopt"] {
            owner.say(&format!("{what} {}", words.join(" ")));
            let answer = owner.hear("answer");
            println!("{what}: {answer}");
            assert!(!answer.contains("PROMOTE"), "{what}: {answer}");
            if what == "adopt" {
                // The child may attach as itself, and as nobody else.
                let stat = scene.daemon.stat();
                let tenants = stat["tenants"].as_array().unwrap();
                let users = tenants.iter().map(|tenant| tenant["uid"].as_u64());
                assert!(
                    users.flatten().all(|uid| uid != u64::from(VICTIM)),
                    "{stat:#}"
                );
            }
        }
        assert!(scene.was_counted(), "{before:#} {:#}", scene.daemon.stat());
        Honest::new(&scene.daemon).promotion();
    }
);

// The child says that it holds the stream of the new program, and then that it can't take it.
scene!(
    the_stream_of_another_program_is_not_given_up,
    |test: &str| {
        let mut scene = Scene::new();
        let mut owner = scene.start(test, CAPABLE);
        owner.say(&format!("become {}", scene.port()));
        let (accepted, _) = scene.listener.accept().unwrap();
        scene.server.announce(1, 1, &accepted, 0);
        scene.server.promote();
        let connection = owner.hear_numbers("connected");
        let words: Vec<String> = connection.iter().map(u64::to_string).collect();
        for what in ["holds", "declined", "lookup", "closed"] {
            owner.say(&format!("{what} {}", words.join(" ")));
            let answer = owner.hear("answer");
            println!("{what}: {answer}");
            assert!(!answer.contains("PROMOTE"), "{what}: {answer}");
            assert_eq!(scene.daemon.stat()["streams_now"], 1, "after {what}");
        }
        assert!(scene.was_counted());
        assert!(scene.server.receive_within(Duration::ZERO).is_none());
    }
);

// Looking at the file of a program may take for ever.
scene!(
    a_program_whose_file_system_does_not_answer_keeps_nobody,
    |test: &str| {
        let program = Program::with(Rights::Nothing);
        for plan in ["exec", "late exec"] {
            let mut scene = Scene::new();
            let bystander = Bystander::new(&scene.daemon);
            let Some(mut system) = FileSystem::start(test, Some(&program.path())) else {
                return;
            };
            let path = system.path().display().to_string();
            let plan = format!("{plan} {path} {}", scene.port());
            // What it needs of its file it has when it is connected.
            let (mut owner, connection, accepted) =
                scene.owner_with(test, 0, &plan, || system.silence());
            bystander.asks(&scene.daemon, &plan);
            let words: Vec<String> = connection.iter().map(u64::to_string).collect();
            owner.say(&format!("announce {}", words.join(" ")));
            owner.hear("announced");
            bystander.goes_on(&scene.daemon, &plan, Duration::from_secs(2));
            scene.server.announce(1, 1, &accepted, 0);
            bystander.goes_on(&scene.daemon, &plan, Duration::from_secs(1));
            Honest::new(&scene.daemon).promotion();
        }
    }
);

// The number of a process comes round; the process does not. (The inode of a socket may come round as well, but
// that takes hours: no test forces it.)
scene!(
    a_process_that_got_the_number_of_a_tenant_keeps_its_connection,
    |test: &str| {
        let binary = std::env::current_exe().unwrap();
        let mut command = Command::new("unshare");
        command
            .args(["--pid", "--fork", "--mount", "--mount-proc", "--kill-child"])
            .arg(binary)
            .args(["--exact", test, "--nocapture", "--test-threads=1"])
            .env("TENANT_PART", "numbers come round")
            .env("TENANT_SOCKET", "");
        let actor = Actor::run(command);
        assert_eq!(actor.hear("answers"), "fine");
    }
);

fn numbers_come_round(test: &str) {
    let program = Program::with(Rights::Nothing);
    let mut scene = Scene::new();
    let mut owner = Actor::start(test, "owner", &scene.daemon.socket(), ATTACKER);
    owner.say("wait");
    owner.hear("attached");
    let pid = owner.pid();
    scene.daemon.signal(Signal::SIGSTOP);
    owner.kill_alone();
    std::fs::write("/proc/sys/kernel/ns_last_pid", (pid - 1).to_string()).unwrap();
    let mut command = Command::new(program.path());
    command
        .arg(scene.port().to_string())
        .uid(VICTIM)
        .gid(VICTIM);
    let victim = Actor::run(command);
    assert_eq!(victim.pid(), pid, "the number has not come round");
    let connection = victim.hear_numbers("connected");
    let (accepted, _) = scene.listener.accept().unwrap();
    let words: Vec<String> = connection.iter().map(u64::to_string).collect();
    owner.say(&format!("announce {}", words.join(" ")));
    owner.hear("announced");
    scene.daemon.signal(Signal::SIGCONT);
    scene.server.announce(1, 1, &accepted, 0);
    let answer = owner.hear("answer");
    assert!(!answer.contains("PROMOTE"), "{answer}");
    assert!(scene.was_counted());
    Honest::new(&scene.daemon).promotion();
    say("answers fine");
}

fn play(part: &Part) {
    match part.name.as_str() {
        "owner" => be_owner(part),
        "connect" => be_connected(part),
        "tenant" => be_tenant(part),
        "file system" => be_file_system(part),
        "numbers come round" => {
            numbers_come_round("a_process_that_got_the_number_of_a_tenant_keeps_its_connection");
        }
        other => panic!("no such part: {other}"),
    }
}
