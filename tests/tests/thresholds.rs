//! `RDSOCK_TEST_LIMITS`: what is wrong in it is told, and a program with rights that its caller lacks does not read it.

use std::os::unix::fs::PermissionsExt;
use std::process::Command;
use std::time::Duration;

use rdsock_tests::{Daemon, Folder, Program, place};

const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn what_is_wrong_in_the_variable_is_told() {
    let (folder, daemon) = (Folder::new(), Daemon::start(""));
    let said = |limits: &str| {
        Program::new("true", folder.path())
            .preloaded(&daemon.socket())
            .env("RDSOCK_TEST_LIMITS", limits)
            .run(LIMIT)
    };
    assert_eq!(said(""), "");
    assert_eq!(
        said("few=0,FEW=4096,piece=1,hot_after=1024,chunk=1073741824"),
        ""
    );
    for (wrong, told) in [
        ("fewer=1", "names \"fewer\", which is no limit"),
        (
            "few",
            "sets few to \"\", which must be a number from 0 to 4096 (8 by default)",
        ),
        ("few=many", "sets few to \"many\", which must be"),
        ("few=-1", "sets few to \"-1\", which must be"),
        ("few=4097", "sets few to \"4097\", which must be"),
        ("piece=0", "must be a number from 1 to 1073741824"),
        ("hot_after=3", "must be a power of two from 1 to 1048576"),
        ("hot_after=0", "must be a power of two from"),
    ] {
        // One that is right before and behind it changes nothing.
        let said = said(&format!("chunk=100,{wrong},chunk=200"));
        assert_eq!(said.lines().count(), 1, "{wrong}: {said}");
        assert!(
            said.starts_with("rdsock: RDSOCK_TEST_LIMITS") && said.contains(told),
            "{wrong}: {said}"
        );
    }
}

/// Loads the shim into each program, as an operator may (LD_PRELOAD never gets into a set-user-id one), and lets another user
/// start a program.
const SCRIPT: &str = r#"
set -e
mount --bind "$1/etc" /etc
exec setpriv --reuid 64001 --regid 64001 --clear-groups env RDSOCK_TEST_LIMITS=nonsense=1 "$1/$2" -u
"#;

#[test]
fn a_set_user_id_program_does_not_read_the_variable() {
    let folder = Folder::new();
    if !place::is_root() {
        eprintln!(
            "SKIPPED, NOTHING WAS CHECKED: only root can make a set-user-id program of root's"
        );
        return;
    }
    let copy = |from: &std::path::Path, name: &str, mode: u32| {
        let to = folder.at(name);
        std::fs::copy(from, &to).unwrap();
        std::fs::set_permissions(&to, PermissionsExt::from_mode(mode)).unwrap();
        to
    };
    let shim = copy(&place::binary("librdsock.so"), "librdsock.so", 0o755);
    std::fs::create_dir(folder.at("etc")).unwrap();
    copy("/etc/ld.so.cache".as_ref(), "etc/ld.so.cache", 0o644);
    folder.write("etc/ld.so.preload", &format!("{}\n", shim.display()));
    let id = place::command(&["id"]);
    copy(&id, "plain", 0o755);
    copy(&id, "privileged", 0o4755);
    let run = |name: &str| {
        let output = Command::new("unshare")
            .args([
                "--mount",
                "--propagation",
                "private",
                "sh",
                "-c",
                SCRIPT,
                "sh",
            ])
            .arg(folder.path())
            .arg(name)
            .output()
            .expect("unshare is installed");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        (text(output.stdout), text(output.stderr))
    };
    let (user, said) = run("plain");
    assert_eq!(user, "64001\n", "{said}");
    assert!(said.contains("names \"nonsense\""), "{said}");
    let (user, said) = run("privileged");
    assert_eq!((user.as_str(), said.as_str()), ("0\n", ""));
}
