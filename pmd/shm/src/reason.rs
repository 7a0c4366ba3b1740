//! Why a connection is, or is not, on rings: the words that `rdsock why` prints.

macro_rules! coded {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $code:literal, $text:literal;)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum $name { $($(#[$vdoc])* $variant = $code,)* }

        impl $name {
            /// All values, for tables and tests.
            pub const ALL: &'static [$name] = &[$($name::$variant,)*];

            /// The value of a code read from shared memory; `None` for an unknown one.
            pub fn from_code(code: u32) -> Option<Self> {
                match code { $($code => Some(Self::$variant),)* _ => None }
            }

            /// A sentence for people.
            pub fn text(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }
    };
}

coded! {
    /// Where a connection's bytes travel.
    State {
        /// Kernel TCP.
        Kernel = 0, "kernel";
        /// Announced to the daemon, which looks for the other end.
        Announced = 1, "announced";
        /// Both directions on rings, or about to be with the next send.
        Rings = 2, "rings";
        /// Back on the kernel for ever.
        Demoted = 3, "demoted";
        /// Broken.
        Reset = 4, "reset";
    }
}

coded! {
    /// Why a connection is not on rings.
    Reason {
        /// No reason: it is on rings, or nothing is known yet.
        None = 0, "none";
        /// Too few calls so far: short connections are not worth the set-up.
        Young = 1, "too few calls yet: a connection is promoted after it has shown that it lasts";
        /// Announced; the daemon has not seen the other end.
        PeerUnknown = 2, "the other end is not announced: its program is not preloaded, or has made too few calls";
        /// The daemon could not be reached.
        NoDaemon = 3, "no daemon: start rdsockd, or use rdsock run";
        /// The daemon refused: see its log.
        Refused = 4, "the daemon refused this tenant";
        /// A limit of the daemon's configuration.
        Limit = 5, "a limit for this user is reached (streams or bytes)";
        /// The stream's memory could not be made or mapped.
        NoMemory = 6, "the stream's memory could not be made or mapped: a limit of address space (ulimit -v) or of mappings (vm.max_map_count) may leave no room";
        /// The two ends are in different network namespaces.
        OtherNamespace = 7, "the other end is in another network namespace";
        /// The daemon could not verify that the tenant holds this socket.
        Unverified = 8, "the daemon could not verify that the program holds this socket";
        /// The daemon's policy keeps this user, program or port off rings.
        Policy = 9, "kept on the kernel by the daemon's policy";
        /// Held by several processes before it could be promoted.
        Shared = 10, "held by several processes (fork) before it was promoted";
        /// Passed to another process over a UNIX socket.
        Passed = 11, "passed to another process (SCM_RIGHTS)";
        /// Kept over exec by a program that will not load the shim.
        Exec = 12, "kept over exec by a program that does not load the shim";
        /// stdio on the socket.
        Stdio = 13, "used through stdio (fdopen)";
        /// Urgent data.
        Urgent = 14, "urgent data (MSG_OOB)";
        /// A socket option that only the kernel can honour.
        Option = 15, "a socket option that only the kernel can honour";
        /// Asynchronous notification.
        Async = 16, "signal-driven I/O (O_ASYNC)";
        /// io_uring was set up in this process.
        IoUring = 17, "io_uring is used in this process";
        /// The shared memory held a value that it must not hold.
        Violation = 18, "the other end wrote an impossible value into shared memory";
        /// Bytes on the anchor that no shim sent, or wake bytes that somebody else took.
        Bypass = 19, "a call slipped past the shim and touched the connection";
        /// The fd number or the connection count is beyond the shim's tables.
        TableFull = 20, "too many descriptors for the shim's tables";
        /// The other end left the rings.
        PeerDemoted = 21, "the other end went back to the kernel";
        /// Bytes were still on the kernel's side, so the stream could not be moved.
        NotQuiet = 22, "the connection had unread or urgent bytes when it had to leave the rings";
        /// Accelerated connections are turned off by RDSOCK_DISABLE.
        Disabled = 23, "turned off by RDSOCK_DISABLE";
        /// A connection that was not seen from its birth.
        Foreign = 24, "the connection was not opened by this program, or not by calls the shim sees";
        /// The call is not carried by rings.
        Call = 25, "a call that rings do not carry was used";
        /// The other end broke the stream, or closed it with unread bytes.
        PeerReset = 26, "the other end broke the stream";
        /// A seccomp filter is in force.
        Sandbox = 27, "the program has put itself into a sandbox (seccomp), which may forbid what rings need";
        /// Between nodes: the other node's daemon does not answer, or not in time.
        NodeAbsent = 28, "the other node does not answer (see rdsock stat): its daemon or the link is down";
        /// Between nodes: no preloaded program listens at the address.
        NoListener = 29, "no preloaded program listens there on the other node";
        /// Between nodes: the other node refused.
        NodeRefused = 30, "the other node refused: its policy or a limit";
        /// Between nodes: the daemon has no device, or it has failed.
        NoDevice = 31, "the daemon drives no device: see its log";
        /// The daemon is kept from duplicates of descriptors, and so knows no socket of another user for sure.
        Unseen = 32, "the daemon may not look at sockets of other users (pidfd_getfd is refused it: by an old kernel, Yama, or a container's filter)";
        /// The kernel is given the socket to use it itself, or may be.
        HandedOver = 33, "given to the kernel by an ioctl, a mount or a map, or an ioctl that rings do not know";
        /// Linux or POSIX asynchronous I/O on the socket.
        Aio = 34, "asynchronous I/O on it (aio_read, io_submit)";
        /// A library that was loaded so that the shim's functions are not its own.
        DeepBind = 35, "a plug-in was loaded with RTLD_DEEPBIND, and the shim can't see its calls";
        /// The program may have so few descriptors that the shim takes none.
        FewDescriptors = 36, "the program may open too few descriptors (ulimit -n) for the shim to have its own";
        /// What the other end owed did not come within this process's patience.
        Late = 37, "the other end took too long: a wake byte that it owed did not come, or it did not take what it had left in the ring, before the connection had to be the kernel's or was closed";
        /// A process ended in the middle of a send of what the other end had left in the ring.
        Lost = 38, "a process that shared the connection ended while it sent again what the other end had left in the ring, so that nobody knows how much of it was sent";
        /// A stream to the other node has the addresses that this one would have.
        Taken = 39, "a connection to the other node with the same addresses is there, or has just been";
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn codes_round_trip() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_code(*reason as u32), Some(*reason));
        }
        for state in State::ALL {
            assert_eq!(State::from_code(*state as u32), Some(*state));
        }
        assert_eq!(Reason::from_code(u32::MAX), None);
    }
}
