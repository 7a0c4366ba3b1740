use super::*;
use crate::process::Standing;
use std::ffi::OsString;

fn glance(executable: &str, owner: (u32, u32), user_namespace: u64) -> Glance {
    Glance {
        standing: Standing {
            owner,
            user_namespace,
        },
        executable: OsString::from(executable),
    }
}

fn rights() -> Rights {
    Rights::new(Namespaces::new().unwrap(), Known::default())
}

#[test]
fn users_see_their_own_and_root_sees_all() {
    let own = geteuid().as_raw();
    assert!(Rights::may_see(0, 7) && Rights::may_see(own, 7));
    let (one, other) = (own.wrapping_add(1000), own.wrapping_add(1001));
    assert!(Rights::may_see(one, one) && !Rights::may_see(one, other));
    assert!(!Rights::may_see(one, 0) && !Rights::sees_all(one));
}

#[test]
fn who_takes_the_place_of_an_anchor_is_not_taken_for_it() {
    // A child of another test's would keep the sockets that are closed here.
    let _alone = crate::own::alone();
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, bind, connect, socket};
    use std::net::{TcpListener, TcpStream};
    let (rights, carrier) = (rights(), Carrier::of_test());
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    let cookie = |socket: &TcpStream| cookie_of(socket.as_fd()).unwrap();
    let connect_from = |from: SocketAddr| {
        let (kind, flags) = (SockType::Stream, SockFlag::SOCK_CLOEXEC);
        let socket = socket(AddressFamily::Inet, kind, flags, None).unwrap();
        bind(socket.as_raw_fd(), &SockaddrStorage::from(from)).unwrap();
        connect(socket.as_raw_fd(), &SockaddrStorage::from(to)).unwrap();
        TcpStream::from(socket)
    };
    // Of this address, nobody else has the port.
    let ours = connect_from("127.83.12.7:0".parse().unwrap());
    let (accepted, from) = listener.accept().unwrap();
    let cookie_of_ours = cookie(&ours);
    let held = |socket: &TcpStream| Held {
        cookie: cookie(socket),
        inode: nix::sys::stat::fstat(socket).unwrap().st_ino,
        shared: false,
        located: None,
        listens: None,
        times: None,
    };
    let is_between = |held: Held, cookie| {
        let located = rights.ask_at_home(to, from).locate(&carrier, held.cookie);
        Rights::is_between(held, located.unwrap(), cookie)
    };
    let its = held(&accepted);
    assert!(is_between(its, cookie_of_ours));
    assert!(!is_between(its, its.cookie) && !is_between(held(&ours), cookie_of_ours));
    // Where the daemon may have no duplicates of descriptors.
    assert!(is_between(Held { cookie: 0, ..its }, cookie_of_ours));
    // One that is half closed is one still.
    ours.shutdown(std::net::Shutdown::Write).unwrap();
    assert!(is_between(its, cookie_of_ours));
    // Broken on either side, so that nothing is left of it.
    for socket in [&ours, &accepted] {
        let linger = libc::linger {
            l_onoff: 1,
            l_linger: 0,
        };
        nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::Linger, &linger).unwrap();
    }
    drop((ours, accepted));
    assert!(!is_between(its, cookie_of_ours));
    let other = connect_from(from);
    let (accepted, name) = listener.accept().unwrap();
    assert_eq!(name, from);
    assert!(is_between(held(&accepted), cookie(&other)));
    assert!(!is_between(held(&accepted), cookie_of_ours) && !is_between(its, cookie(&other)));
}

/// It comes from where an earlier one came from, to what that has left, and drops all that is answered.
#[test]
fn a_socket_in_its_handshake_has_no_other_end() {
    let _alone = crate::own::alone();
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, bind, connect, socket};
    use std::net::{TcpListener, TcpStream};
    let set = |socket: &TcpStream, level, name, value: i32| {
        let (value, size) = ((&raw const value).cast(), size_of::<i32>() as u32);
        // SAFETY: it reads so many bytes of the value.
        let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value, size) };
        assert_eq!(result, 0);
    };
    let socket_at = |from: SocketAddr| {
        let (kind, flags) = (SockType::Stream, SockFlag::SOCK_CLOEXEC);
        let socket = socket(AddressFamily::Inet, kind, flags, None).unwrap();
        let bound = bind(socket.as_raw_fd(), &SockaddrStorage::from(from));
        bound.map(|()| TcpStream::from(socket))
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let to = listener.local_addr().unwrap();
    // Of this address, nobody else has the port.
    let first = socket_at("127.83.12.8:0".parse().unwrap()).unwrap();
    set(&first, libc::IPPROTO_TCP, libc::TCP_LINGER2, 1);
    connect(first.as_raw_fd(), &SockaddrStorage::from(to)).unwrap();
    let (accepted, from) = listener.accept().unwrap();
    drop(first);
    // What is left of it goes soon.
    let end = Instant::now() + std::time::Duration::from_secs(20);
    let later = loop {
        match socket_at(from) {
            Ok(socket) => break socket,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
    };
    set(&later, libc::IPPROTO_IP, libc::IP_MINTTL, 255);
    later.set_nonblocking(true).unwrap();
    let connected = connect(later.as_raw_fd(), &SockaddrStorage::from(to));
    assert_eq!(connected, Err(Errno::EINPROGRESS));
    let cookie = |socket: &TcpStream| cookie_of(socket.as_fd()).unwrap();
    let rights = rights();
    let ask = rights.ask_at_home(from, to);
    let located = ask.locate(&Carrier::of_test(), cookie(&later)).unwrap();
    assert_eq!(located.own.map(|own| own.cookie), Some(cookie(&later)));
    assert_eq!(located.other_end, None);
    drop(accepted);
}

/// Inodes come again, and a look may be of an earlier use of the record.
#[test]
fn an_announcement_is_of_the_very_socket_that_was_found() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::MetadataExt;
    let pair = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    );
    let passport = Passport {
        peer: Arc::new(Peer::of(&pair.unwrap().0).unwrap()),
        program: Program::default(),
        netns: None,
        seen: None,
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let link = format!("/proc/self/fd/{}", stream.as_raw_fd());
    let held = Held {
        cookie: cookie_of(stream.as_fd()).unwrap(),
        inode: std::fs::metadata(link).unwrap().ino(),
        shared: false,
        located: None,
        listens: None,
        times: None,
    };
    let claim = Claim {
        conn: Conn {
            tenant: 1,
            number: 2,
            generation: 3,
        },
        fd: stream.as_raw_fd(),
        cookie: held.cookie,
        netns_cookie: netns_cookie_of(stream.as_fd()).unwrap_or(0),
        local: stream.local_addr().unwrap(),
        peer: stream.peer_addr().unwrap(),
        role: Role::Active,
        maybe_shared: false,
    };
    let rights = rights();
    let own = crate::process::netns_inode(std::process::id() as i32).ok();
    let names = (claim.local, claim.peer);
    let ask = rights.ask_at(own, claim.netns_cookie, names).unwrap();
    let located = ask.locate(&Carrier::of_test(), claim.cookie).unwrap();
    let announced =
        |claim: &Claim, held| Rights::announced(claim, held, located, &passport).is_some();
    assert!(announced(&claim, held));
    let another = Held {
        cookie: held.cookie + 1,
        ..held
    };
    assert!(!announced(&claim, another));
    // No cookie stands for any.
    let any = Claim {
        cookie: 0,
        ..claim.clone()
    };
    assert!(!announced(&any, Held { cookie: 0, ..held }));
    let elsewhere = Claim {
        peer: claim.local,
        ..claim.clone()
    };
    assert!(!announced(&elsewhere, held));
}

/// Only the two ends of a connection meet, and only while both are there.
#[test]
fn the_two_ends_of_a_connection_meet() {
    // A child of another test's would keep the sockets that are closed here.
    let _alone = crate::own::alone();
    use std::net::{TcpListener, TcpStream};
    use std::os::unix::fs::MetadataExt;
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let pair = || {
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (stream, listener.accept().unwrap().0)
    };
    let socket = |stream: &TcpStream| {
        let link = format!("/proc/self/fd/{}", stream.as_raw_fd());
        Socket {
            cookie: cookie_of(stream.as_fd()).unwrap(),
            inode: std::fs::metadata(link).unwrap().ino(),
        }
    };
    let ((one, other), (third, fourth)) = (pair(), pair());
    let route = Route {
        netns: 0,
        local: one.local_addr().unwrap(),
        peer: one.peer_addr().unwrap(),
    };
    let diag = Arc::new(Diag::of_home().unwrap());
    let ask = Ask {
        route,
        diag,
        both: true,
    };
    let (own, its) = (socket(&one), socket(&other));
    let carrier = Carrier::of_test();
    let meet = |own, other| ask.meet(&carrier, own, other);
    let other_end = || ask.locate(&carrier, own.cookie).unwrap().met();
    assert_eq!(meet(own, its), Meeting::Both);
    assert_eq!(other_end(), Some(its));
    let of_another = |socket: Socket| Socket { inode: 1, ..socket };
    for stranger in [own, socket(&third), socket(&fourth), of_another(its)] {
        assert_eq!(meet(own, stranger), Meeting::One, "{stranger:?}");
    }
    for stranger in [its, socket(&third), socket(&fourth), of_another(own)] {
        assert_eq!(meet(stranger, its), Meeting::None, "{stranger:?}");
    }
    drop(other);
    assert_ne!(meet(own, its), Meeting::Both);
    assert_eq!(other_end(), None);
}

/// Another user may have the port of the other family.
#[test]
fn a_socket_is_of_its_own_family() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket};
    let made = |family| {
        let flags = SockFlag::SOCK_CLOEXEC;
        socket(family, SockType::Stream, flags, None).unwrap()
    };
    let [four, six] = ["0.0.0.0", "::"].map(|text| text.parse::<IpAddr>().unwrap());
    let of_four = made(AddressFamily::Inet);
    assert!(has_family(&of_four, four, four) && !has_family(&of_four, four, six));
    let of_six = made(AddressFamily::Inet6);
    setsockopt(&of_six, sockopt::Ipv6V6Only, &false).unwrap();
    assert!(has_family(&of_six, six, four) && has_family(&of_six, six, six));
    setsockopt(&of_six, sockopt::Ipv6V6Only, &true).unwrap();
    assert!(!has_family(&of_six, six, four) && has_family(&of_six, six, six));
}

/// Nobody else listens at such a place.
#[test]
fn it_is_asked_of_the_socket_where_it_listens() {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, bind, setsockopt, socket};
    use nix::sys::socket::{Backlog, listen};
    let home = Namespaces::new().unwrap().home_cookie();
    let made = |family, at: &str, six_only: bool| {
        let flags = SockFlag::SOCK_CLOEXEC;
        let socket = socket(family, SockType::Stream, flags, None).unwrap();
        if family == AddressFamily::Inet6 {
            setsockopt(&socket, sockopt::Ipv6V6Only, &six_only).unwrap();
        }
        let at = SockaddrStorage::from(at.parse::<SocketAddr>().unwrap());
        bind(socket.as_raw_fd(), &at).unwrap();
        socket
    };
    let four = made(AddressFamily::Inet, "127.0.0.1:0", false);
    assert_eq!(listens_at(&four, home), None);
    listen(&four, Backlog::new(1).unwrap()).unwrap();
    let listens = listens_at(&four, home).unwrap();
    assert_eq!(listens.address.ip(), IpAddr::V4(Ipv4Addr::LOCALHOST));
    assert!(listens.address.port() != 0 && !listens.of_both);
    if netns_cookie_of(four.as_fd()).is_some() {
        assert_eq!(listens_at(&four, Home(home.0 + 1)), None);
    }
    for six_only in [false, true] {
        let six = made(AddressFamily::Inet6, "[::]:0", six_only);
        listen(&six, Backlog::new(1).unwrap()).unwrap();
        let listens = listens_at(&six, home).unwrap();
        assert!(listens.address.is_ipv6());
        assert_eq!(listens.of_both, !six_only);
    }
}

#[test]
fn what_was_promised_is_for_the_same_user_alone() {
    assert!(Rights::may_have_promised(7, 7));
    assert!(!Rights::may_have_promised(7, 8) && !Rights::may_have_promised(0, 7));
}

#[test]
fn a_stream_to_another_node_is_one_users() {
    let of = Whose::User(7);
    assert!(Rights::may_have_carried(7, of, false) && !Rights::may_have_carried(8, of, true));
    let of = Whose::Listeners { cookie: 1, uid: 7 };
    assert!(Rights::may_have_carried(7, of, false) && Rights::may_have_carried(8, of, true));
    assert!(!Rights::may_have_carried(8, of, false));
    // Not even root's.
    assert!(!Rights::may_have_carried(0, of, false));
}

#[test]
fn what_gives_a_process_more_shows_at_a_glance() {
    let before = glance("/bin/a", (1000, 1000), 1);
    let changed = |now: &Glance| same_glance(&before, now);
    assert_eq!(changed(&before), Ok(()));
    // It was replaced on disk.
    assert_eq!(
        changed(&glance("/bin/a (deleted)", (1000, 1000), 1)),
        Ok(())
    );
    let program = Err(Changed::Program);
    assert_eq!(changed(&glance("/bin/b", (1000, 1000), 1)), program);
    for rights in [
        // Set-user-id, set-group-id; capabilities, or memory that is hidden: then root owns its files.
        glance("/bin/a", (0, 1000), 1),
        glance("/bin/a", (1000, 5), 1),
        glance("/bin/a", (0, 0), 1),
        glance("/bin/a", (1000, 1000), 2),
    ] {
        assert_eq!(changed(&rights), Err(Changed::Rights));
    }
}

#[test]
fn a_claim_has_its_numbers_in_range() {
    let conn = Conn {
        tenant: 1,
        number: 2,
        generation: 3,
    };
    let honest = Request {
        active: 2,
        local_port: 80,
        peer_port: 65_535,
        ..rdsock_shm::control::from_bytes(&[0; size_of::<Request>()]).unwrap()
    };
    let claim = Claim::parse(conn, &honest).unwrap();
    assert_eq!((claim.role, claim.peer.port()), (Role::Unknown, 65_535));
    for lie in [
        Request {
            local_port: 65_536,
            ..honest
        },
        Request {
            peer_port: u32::MAX,
            ..honest
        },
        Request {
            active: 3,
            ..honest
        },
    ] {
        assert!(Claim::parse(conn, &lie).is_none(), "{lie:?}");
    }
}

#[test]
fn very_many_users_search_as_one_beside_those_who_are_known() {
    let known = [7, 8].into_iter().collect();
    let mut rights = Rights::new(Namespaces::new().unwrap(), known);
    let mut of = |uid| rights.searches_of(uid);
    let (one, other, of_crowd) = (of(7), of(8), of(100_000));
    assert!(!Arc::ptr_eq(&one, &other) && !Arc::ptr_eq(&one, &of_crowd));
    assert!(Arc::ptr_eq(&one, &of(7)));
    for uid in 100_001..100_100 {
        assert!(Arc::ptr_eq(&of_crowd, &of(uid)));
    }
    assert_eq!(rights.searches.len(), 3);
}

/// Where the kernel rewrites addresses, two sockets can have each other's and be the ends of two connections.
#[test]
fn only_ends_that_hear_each_other_are_a_pair() {
    let start = Instant::now();
    // Seconds since then: what was said, and what was heard.
    let at = |(said, heard): (u64, u64)| Times {
        said: start + Duration::from_secs(said),
        heard: start + Duration::from_secs(heard),
    };
    let pair = |one: Option<(u64, u64)>, other: Option<(u64, u64)>| {
        let announced = |tenant, role| crate::book::tests::announced(tenant, 1, role);
        let one = Announced {
            times: one.map(at),
            ..announced(1, Role::Active)
        };
        let other = Announced {
            times: other.map(at),
            other_end: Some(one.socket()),
            ..announced(2, Role::Passive)
        };
        Rights::meet(&one, &other)
    };
    assert!(pair(Some((5, 5)), Some((5, 5))));
    assert!(pair(Some((5, 2)), Some((2, 5))));
    // It has said something else since the other one was looked at.
    assert!(pair(Some((5, 9)), Some((2, 5))));
    // A socket that was left behind, and one that was connected later.
    assert!(!pair(Some((1, 1)), Some((5, 5))));
    assert!(!pair(Some((5, 5)), Some((1, 1))));
    assert!(!pair(Some((9, 1)), Some((5, 5))));
    // The daemon may ask neither, or one of them alone.
    assert!(pair(None, None));
    assert!(!pair(None, Some((5, 5))));
}

/// As two ends tell when they have heard from each other.
#[test]
fn the_ends_of_a_connection_hear_each_other() {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut one = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (mut other, _) = listener.accept().unwrap();
    let times = |stream: &TcpStream| times_of(stream.as_fd()).unwrap();
    let hear = |one: &TcpStream, other: &TcpStream| {
        let tick = Duration::from_millis(30);
        let (said, heard) = (times(one).said, times(other).heard);
        heard + tick >= said
    };
    assert!(hear(&one, &other) && hear(&other, &one));
    std::thread::sleep(Duration::from_millis(200));
    let before = times(&other).heard;
    one.write_all(b"x").unwrap();
    other.read_exact(&mut [0]).unwrap();
    assert!(hear(&one, &other) && hear(&other, &one));
    assert!(times(&other).heard > before + Duration::from_millis(100));
}
