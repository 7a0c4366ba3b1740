//! sshd with ssh and sftp: a server that hands each connection over exec and stdio to a process of
//! its own, whose unprivileged half goes into a seccomp sandbox before anybody has logged in.
//!
//! Nothing is expected to be on rings here; all bytes are expected to be right.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rdsock_tests::{Mode, Program, Running, Site, folder, in_each_mode, place, why};

const LIMIT: Duration = Duration::from_secs(120);

struct Sshd {
    running: Running,
    port: u16,
    /// What a client needs to get in.
    config: PathBuf,
    /// Who may: the user that the tests run as.
    user: String,
}

/// Makes a pair of keys in the site's folder.
fn make_key(site: &Site, name: &str) {
    site.plain(place::command(&["ssh-keygen"]))
        .args("-q -t ed25519 -f")
        .arg(site.folder.at(name))
        .arg("-N")
        .arg("")
        .run(LIMIT);
}

/// A server with a key of its own, and one key that it lets in, whoever shows it.
fn server(site: &Site, options: &str) -> Sshd {
    let port = place::free_port();
    let here = site.folder.path().display();
    make_key(site, "host");
    make_key(site, "key");
    if place::is_root() {
        // Where its unprivileged half is locked up; else Debian's service makes it.
        std::fs::create_dir_all("/run/sshd").expect("root makes folders in /run");
    }
    let config = format!(
        "Port {port}
ListenAddress 127.0.0.1
HostKey {here}/host
PidFile none
AuthorizedKeysFile {here}/key.pub
StrictModes no
PermitRootLogin yes
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
MaxStartups 50
LogLevel VERBOSE
Subsystem sftp internal-sftp
"
    );
    let config = site.folder.write("sshd_config", &config);
    let mut running = site
        .server(place::command(&["sshd"]))
        .args("-D -e")
        .args(options)
        .arg("-f")
        .arg(config)
        .start();
    running.wait_for_output("Server listening", LIMIT);
    let host = std::fs::read_to_string(site.folder.at("host.pub")).expect("ssh-keygen wrote it");
    site.folder
        .write("known", &format!("[127.0.0.1]:{port} {host}"));
    // New keys every 8 MiB: another exchange in the middle of the bytes.
    let config = format!(
        "Host *
HostName 127.0.0.1
Port {port}
IdentityFile {here}/key
IdentitiesOnly yes
IdentityAgent none
UserKnownHostsFile {here}/known
GlobalKnownHostsFile none
StrictHostKeyChecking yes
BatchMode yes
RekeyLimit 8M
"
    );
    let config = site.folder.write("ssh_config", &config);
    let user = site.plain("id").arg("-un").run(LIMIT).trim().to_owned();
    Sshd {
        running,
        port,
        config,
        user,
    }
}

/// An ssh with these options (or a command there); the shell sends its bytes to and from files.
fn ssh(site: &Site, sshd: &Sshd, options: &str, redirect: &str) -> Program {
    let script = format!(
        "exec {} -F {} -l {} here {options} {redirect}",
        place::command(&["ssh"]).display(),
        sshd.config.display(),
        sshd.user,
    );
    site.client("/bin/sh").arg("-c").arg(script)
}

fn download(site: &Site, sshd: &Sshd, from: &Path, to: &Path) -> Program {
    let command = format!("cat {}", from.display());
    ssh(site, sshd, &command, &format!(">{}", to.display()))
}

fn upload(site: &Site, sshd: &Sshd, from: &Path, to: &Path) -> Program {
    let command = format!("'cat >{}'", to.display());
    ssh(site, sshd, &command, &format!("<{}", from.display()))
}

/// No half of the server has crashed, was killed by the sandbox, or read what was not sent.
fn check_log(sshd: &Sshd) {
    let log = sshd.running.output();
    let wrong = [
        "fatal",
        "error",
        "signal",
        "orrupted",
        "Bad packet",
        "reset",
    ];
    for word in wrong {
        assert!(!log.contains(word), "sshd says {word}:\n{log}");
    }
}

fn big_file(site: &Site, sshd: &Sshd) {
    let big = site.folder.write_noise("big", 64 << 20);
    let back = site.folder.at("back");
    download(site, sshd, &big, &back).run(LIMIT);
    assert!(folder::same_bytes(&big, &back), "the file comes as it is");
    let there = site.folder.at("there");
    upload(site, sshd, &big, &there).run(LIMIT);
    assert!(folder::same_bytes(&big, &there), "the file goes as it is");
    check_log(sshd);
}

fn several(site: &Site, sshd: &Sshd) {
    let file = site.folder.write_noise("file", 12 << 20);
    let clients: Vec<(PathBuf, Running)> = (0..6)
        .map(|i| {
            let copy = site.folder.at(&format!("copy{i}"));
            let client = match i % 2 {
                0 => download(site, sshd, &file, &copy),
                _ => upload(site, sshd, &file, &copy),
            };
            (copy, client.start())
        })
        .collect();
    for (copy, client) in clients {
        client.finish(LIMIT);
        assert!(folder::same_bytes(&file, &copy), "each copy is whole");
    }
    check_log(sshd);
}

fn big_file_by_checksum(site: Site) {
    let sshd = server(&site, "");
    big_file(&site, &sshd);
}

fn several_at_once(site: Site) {
    let sshd = server(&site, "");
    several(&site, &sshd);
}

/// A server that forks and does not exec holds the connection from `accept` to the sandbox and
/// beyond. It may go on rings at any moment of that, and then comes back when the sandbox closes.
fn without_exec(site: Site) {
    let sshd = server(&site, "-r");
    big_file(&site, &sshd);
    several(&site, &sshd);
    let small = site.folder.write_noise("small", 300_000);
    for round in 0..4 {
        let clients: Vec<(PathBuf, Running)> = (0..5)
            .map(|i| {
                let copy = site.folder.at(&format!("small{round}-{i}"));
                let client = download(&site, &sshd, &small, &copy);
                (copy, client.start())
            })
            .collect();
        for (copy, client) in clients {
            client.finish(LIMIT);
            assert!(folder::same_bytes(&small, &copy), "each copy is whole");
        }
    }
    check_log(&sshd);
}

/// sshd gets the connection as descriptors 0 and 1, through exec: it stays on the kernel, and says
/// why.
fn why_not_on_rings(mut site: Site) {
    let sshd = server(&site, "");
    let mut client = ssh(&site, &sshd, "'echo inside; sleep 1'", "").start();
    client.wait_for_output("inside", LIMIT);
    let mode = site.mode;
    if let Some(daemon) = site.daemon() {
        let mut ends = why::ask(&daemon.socket(), None).connections;
        ends.retain(|end| end.touches(sshd.port));
        for end in &ends {
            assert!(!end.accelerated && end.reason.is_some(), "{end:#?}");
        }
        let reason = |program: &str| {
            let end = ends.iter().find(|end| end.program == program);
            end.and_then(|end| end.reason.clone()).unwrap_or_default()
        };
        if matches!(mode, Mode::Both | Mode::ServerOnly) {
            assert!(reason("sshd").contains("stdio"), "{ends:#?}");
        }
        if mode == Mode::Both {
            assert!(reason("ssh").contains("stdio"), "{ends:#?}");
        }
        if mode == Mode::ClientOnly {
            assert!(reason("ssh").contains("not preloaded"), "{ends:#?}");
        }
    }
    client.finish(LIMIT);
    check_log(&sshd);
}

/// The server's half that talks to the network becomes the user who has logged in.
fn sftp_as_another_user(site: Site) {
    let mut sshd = server(&site, "");
    if place::is_root() {
        sshd.user = "nobody".to_owned();
    } else {
        println!("sftp as another user: left to root");
    }
    let big = site.folder.write_noise("big", 32 << 20);
    let back = site.folder.at("back");
    site.client(place::command(&["sftp"]))
        .arg("-q")
        .arg("-F")
        .arg(&sshd.config)
        .arg(format!("{}@here:{}", sshd.user, big.display()))
        .arg(&back)
        .run(LIMIT);
    assert!(folder::same_bytes(&big, &back), "the file comes as it is");
    check_log(&sshd);
}

/// A connection through ssh and sshd, each of which has two, to a program that answers when it has
/// all.
fn forwarded_port(site: Site) {
    let sshd = server(&site, "");
    let (end, front) = (place::free_port(), place::free_port());
    let mut socat = site
        .server(place::command(&["socat"]))
        .args("-d -d -t 20")
        .arg(format!("TCP4-LISTEN:{end},bind=127.0.0.1,reuseaddr,fork"))
        .arg("SYSTEM:sha256sum")
        .start();
    socat.wait_for_output("listening on", LIMIT);
    let _tunnel = site
        .client(place::command(&["ssh"]))
        .arg("-F")
        .arg(&sshd.config)
        .args(&format!(
            "-N -L 127.0.0.1:{front}:127.0.0.1:{end} -l {} here",
            sshd.user
        ))
        .start()
        .wait_for_port(front);
    let file = site.folder.write_noise("file", 24 << 20);
    let right = site
        .plain(place::command(&["sha256sum"]))
        .input(&file)
        .run(LIMIT);
    let clients: Vec<Running> = (0..3)
        .map(|_| {
            site.client(place::command(&["socat"]))
                .args("-t 20 STDIO")
                .arg(format!("TCP4:127.0.0.1:{front}"))
                .input(&file)
                .start()
        })
        .collect();
    for client in clients {
        assert_eq!(client.finish(LIMIT), right);
    }
    check_log(&sshd);
}

in_each_mode!(
    big_file_by_checksum,
    several_at_once,
    without_exec,
    why_not_on_rings,
    sftp_as_another_user,
    forwarded_port,
);
