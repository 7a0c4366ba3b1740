//! The daemon: joins its owners, and is their event loop.
//!
//! Each thing has one owner, whose state is its own: the [`Agenda`] what is waited for and due, [`Connections`] who is
//! connected and attached, the [`Streams`] who holds which stream, the fabric's `Control` what leads to other nodes,
//! the [`Accounts`] what each user has, the [`Journal`] what was counted and logged. The [`Rights`] decide, [`Porters`]
//! do what may have to be waited for. The files of this folder say what an event means for them, each for one kind of
//! event.

mod anchors;
mod announcements;
mod between;
mod callers;
mod greetings;
mod listeners;
mod queries;
mod streams;
mod tenants;
mod turn;
mod vain;

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::sys::epoll::EpollFlags;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::unistd::geteuid;
use rdsock_shm::control::NAMELESS;
use tracing::{error, info, warn};

use crate::accounts::Accounts;
use crate::agenda::{Agenda, Due, Token};
use crate::args::Args;
use crate::channel::Foreign;
use crate::config::{Config, ConfigError};
use crate::confine::Confinement;
use crate::connections::Connections;
use crate::endpoint::{Endpoint, EndpointError};
use crate::fabric::{Control, Doors};
use crate::found::Found;
use crate::journal::Journal;
use crate::lines::Lines;
use crate::namespaces::Namespaces;
use crate::notify::notify;
use crate::own;
use crate::porters::{self, Here, IN_PLACE_OF_USERS, KEEPERS, NOBODY, Porters};
use crate::process::Peer;
use crate::relay::{Back, Relay};
use crate::rights::Rights;
use crate::sentry::{Sentries, Sentry};
use crate::shares::{Known, Shares, Turns};
use crate::starter::Starter;
use crate::streams::Streams;
use crate::users;

use announcements::Announcements;
use callers::{End, Watched};
use turn::{Busy, Kind, Portion, Turn, Work, put_behind};
use vain::CallsInVain;

/// Why the daemon does not run.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// The control socket.
    #[error(transparent)]
    Endpoint(#[from] EndpointError),
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The fabric.
    #[error("the fabric: {0}")]
    Fabric(#[from] rdsock_node::StartError),
    /// No program believes it.
    #[error(
        "the daemon runs as user {NAMELESS}, the number by which the kernel calls each user that has none, so that no program \
         believes it: run it as another user"
    )]
    Nameless,
    /// The system said no.
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
}

fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> DaemonError {
    move |error| DaemonError::System(what, error.into())
}

/// The daemon. See the module's text.
#[derive(Debug)]
pub struct Daemon {
    args: Args,
    config: Config,
    endpoint: Endpoint,
    signals: SignalFd,
    /// Descriptors that this process may have.
    descriptors: u64,
    agenda: Agenda,
    starter: Starter,
    porters: Porters<Found>,
    ends: Sentry<Arc<Peer>>,
    handed_over: Sentries<Arc<Foreign>>,
    rights: Rights,
    accounts: Accounts,
    journal: Journal,
    connections: Connections,
    announcements: Announcements,
    in_vain: CallsInVain,
    /// Processes that have hung up and live on, by their connection.
    watched: HashMap<u64, Watched>,
    /// Tenants that the present round of looks at all of them has not come to; `None` when no round is due.
    swept: Option<VecDeque<u64>>,
    /// Tenants with requests left in their queues, and connections with an answer to go on with.
    busy: Busy,
    /// What was last done for a user, and of which event.
    done_last: Kind,
    served_last: Token,
    known: Known,
    shares: Shares,
    streams: Streams,
    /// The path to other nodes, where one is configured.
    fabric: Option<Control>,
    confinement: Confinement,
    turn: Turn,
    last_use: Instant,
    started: Instant,
}

type Baton = Relay<Daemon, Result<(), DaemonError>>;

impl Daemon {
    /// Makes the control socket; nobody is served before [`Daemon::run`].
    pub fn new(args: Args, config: Config, log: &Lines) -> Result<Self, DaemonError> {
        if geteuid().as_raw() == NAMELESS {
            return Err(DaemonError::Nameless);
        }
        let descriptors = own::raise_limits();
        // While there is one thread.
        own::make_room(descriptors);
        // Before there is any other descriptor.
        let doors = match &config.fabric {
            Some(_) => Some(Doors::new().map_err(system("the port for anchors"))?),
            None => None,
        };
        let mut mask = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
            mask.add(signal);
        }
        mask.thread_block().map_err(system("block signals"))?;
        let signals = SignalFd::with_flags(&mask, SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK)
            .map_err(system("signalfd"))?;
        let socket: PathBuf = config
            .socket
            .clone()
            .unwrap_or_else(crate::endpoint::default_socket);
        let endpoint = Endpoint::new(&socket, &users::known(&config, descriptors))?;
        let descriptors = descriptors.saturating_sub(endpoint.listeners().len() as u64);
        let agenda = Agenda::new().map_err(system("epoll"))?;
        // Before there is another thread.
        let device = config.fabric.as_ref().map(|fabric| &fabric.device);
        let mut confinement = Confinement::begin(config.confine, device.into());
        log.start_writer().map_err(system("log"))?;
        let starter = Starter::new().map_err(system("starter"))?;
        let of_users = endpoint
            .listeners()
            .iter()
            .filter_map(|listener| listener.user);
        let known: Known = of_users.chain(IN_PLACE_OF_USERS).collect();
        let porters = Porters::new(starter.clone(), known.clone());
        let porters = porters.map_err(system("porters"))?;
        let told = porters.clone();
        let ends = Sentry::start(&starter, move |id, peer: &Arc<Peer>, _| {
            told.tell(peer.uid, Found::Ended(id));
        });
        let ends = ends.map_err(system("sentry"))?;
        let told = porters.clone();
        let tell = move |id, socket: &Arc<Foreign>, flags| {
            told.tell(socket.owner().uid, Found::Event(id, flags));
        };
        let handed_over = Sentries::new(known.clone(), starter.clone(), tell);
        let handed_over = handed_over.map_err(system("sentry"))?;
        let watched = agenda.watch(&signals, Token::Signals);
        watched.map_err(system("epoll"))?;
        for (number, listener) in (0..).zip(endpoint.listeners()) {
            let watched = agenda.watch(&listener.socket, Token::Listener(number));
            watched.map_err(system("epoll"))?;
        }
        let edge = EpollFlags::EPOLLIN | EpollFlags::EPOLLET;
        let found = agenda.watch_for(porters.found(), edge, Token::Found);
        found.map_err(system("epoll"))?;
        let namespaces = Namespaces::new().map_err(system("network namespace"))?;
        let fabric = match config.fabric.as_ref().zip(doors) {
            Some((fabric, doors)) => {
                let known = known.clone();
                Some(Control::start(
                    fabric,
                    doors,
                    &mut confinement,
                    &agenda,
                    known,
                )?)
            }
            None => None,
        };
        confinement.filter();
        let now = Instant::now();
        Ok(Daemon {
            accounts: Accounts::new(config.limits(descriptors), known.clone()),
            args,
            config,
            endpoint,
            signals,
            descriptors,
            agenda,
            starter,
            porters,
            ends,
            handed_over,
            rights: Rights::new(namespaces, known.clone()),
            journal: Journal::default(),
            connections: Connections::default(),
            announcements: Announcements::default(),
            in_vain: CallsInVain::new(now),
            watched: HashMap::new(),
            swept: None,
            busy: Busy::new(known.clone()),
            done_last: Kind::Event,
            served_last: Token::Signals,
            shares: Shares::new(now, known.clone()),
            known,
            streams: Streams::default(),
            fabric,
            confinement,
            turn: Turn::start(),
            last_use: now,
            started: now,
        })
    }

    /// Serves until a signal, or until it was idle for long enough.
    pub fn run(mut self) -> Result<(), DaemonError> {
        let path = self.endpoint.path().display().to_string();
        info!(socket = path, pid = std::process::id(), "ready");
        if let Err(error) = notify("READY=1") {
            warn!("can't notify the service manager: {error}");
        }
        self.turn = Turn::start();
        let starter = self.starter.clone();
        let end = Relay::start(Box::new(self), Self::leg, starter);
        let end = end.map_err(system("control thread"))?;
        // Threads that are still held up end with the process.
        let lost = |_| {
            Err(system("control thread")(io::Error::other(
                "it has panicked",
            )))
        };
        end.recv().unwrap_or_else(lost)
    }

    /// Serves until the end, or until another thread goes on.
    fn leg(mut daemon: Box<Self>, relay: &Baton) -> Option<Result<(), DaemonError>> {
        daemon.journal.other_thread(own::processor_time());
        if daemon.porters.take_over() {
            daemon.journal.counters.held_up += 1;
        }
        // The turn of a thread that was held up ends here.
        daemon.turn.end(&mut daemon.journal);
        loop {
            let events = match daemon.agenda.wait(daemon.wait_until()) {
                Ok(events) => events,
                Err(error) => return Some(Err(system("epoll")(error))),
            };
            daemon.turn = Turn::start();
            daemon.announcements.forget_what_is_fresh();
            if daemon.has_notices() {
                daemon.on_fabric();
                daemon.turn.did(|| "what poll cores say".to_owned());
            }
            let Some(of_users) = daemon.on_events(events) else {
                daemon.stop("signal");
                return Some(Ok(()));
            };
            daemon.on_all_due();
            daemon = daemon.serve_users(of_users, relay)?;
            daemon.turn.end(&mut daemon.journal);
            if daemon.idle_end().is_some_and(|end| end <= Instant::now()) {
                daemon.stop("idle");
                return Some(Ok(()));
            }
        }
    }

    /// Serves users, each time the one who has used the least of this thread lately, until the turn is over. Events for which it
    /// has no time are told of again; all else waits for the next turn. `None` when a look took so long that another thread has
    /// gone on.
    fn serve_users(
        mut self: Box<Self>,
        mut events: Turns<(Token, EpollFlags)>,
        relay: &Baton,
    ) -> Option<Box<Self>> {
        let mut portion = self.portion();
        while portion.has_room()
            && let Some((uid, work)) = self.next_work(&mut events)
        {
            let what = work.what();
            match work {
                Work::Event(token, flags) => {
                    self.served_last = token;
                    self.on_event(token, flags);
                }
                Work::Requests(id) => self.serve(id, |daemon| daemon.go_on(id)),
                Work::Here(Here::Found(found)) => self.on_find(found),
                Work::Here(Here::Look(owner, look)) => {
                    self.journal.counters.looks += 1;
                    let yard = self.porters.clone();
                    match relay.risk(self, |used| porters::carry(look, used)) {
                        Back::Held(daemon, (found, pace)) => {
                            self = daemon;
                            yard.carried(pace);
                            if let Some(found) = found {
                                self.on_find(found);
                            }
                        }
                        Back::Lost((found, _)) => {
                            yard.come_back(owner, found);
                            return None;
                        }
                    }
                }
            }
            let took = self.turn.did(|| format!("{what} of user {uid}"));
            self.shares.charge(uid, took, self.turn.last);
        }
        Some(self)
    }

    /// What is done next, for the user who has used the least. Where that one has things of several kinds there, these take turns.
    fn next_work(&mut self, events: &mut Turns<(Token, EpollFlags)>) -> Option<(u32, Work)> {
        let order = |uid| self.shares.of(uid);
        let firsts = [
            (Kind::Here, self.porters.first(order)),
            (Kind::Requests, self.busy.turns.first(order)),
            (Kind::Event, events.first(order)),
        ];
        let there = firsts
            .into_iter()
            .filter_map(|(kind, first)| Some((first?, kind)));
        let (_, kind) = there.min_by_key(|(first, kind)| (*first, self.done_last.behind(*kind)))?;
        self.done_last = kind;
        match kind {
            Kind::Here => {
                let (uid, here) = self.porters.next(order)?;
                Some((uid, Work::Here(here)))
            }
            Kind::Requests => {
                let (uid, id) = self.busy.next(order)?;
                Some((uid, Work::Requests(id)))
            }
            Kind::Event => {
                let (uid, (token, flags)) = events.next(order)?;
                Some((uid, Work::Event(token, flags)))
            }
        }
    }

    /// What may be done now. Looks whether streams are held are for those whose streams have just ended: nobody else comes with them.
    fn portion(&self) -> Portion {
        Portion::new(self.shares.users_beside(KEEPERS) > 1)
    }

    /// What is due, the longest due first. What is left is due in the next turn, which does not wait.
    fn on_all_due(&mut self) {
        let (now, mut portion) = (Instant::now(), self.portion());
        while portion.has_room()
            && let Some(due) = self.agenda.next_due(now)
        {
            self.on_due(due);
            self.turn.did(|| format!("{due:?}"));
        }
    }

    /// A connection has work left for the next turn.
    fn goes_on(&mut self, id: u64) {
        if let Some(uid) = self.user_of(Token::Connection(id)) {
            self.busy.push(uid, id);
        }
    }

    fn stop(&self, why: &str) {
        let _ = notify("STOPPING=1");
        info!(
            why,
            tenants = self.connections.tenants(),
            "ending; streams live on without the daemon"
        );
    }

    /// `None` when nothing but an event ends the wait.
    fn wait_until(&self) -> Option<Instant> {
        let rest = self.porters.here() != 0 || self.has_notices();
        if self.busy.turns.is_empty() && !rest {
            self.idle_end()
        } else {
            Some(Instant::now())
        }
    }

    /// When an idle daemon ends; `None` when it does not.
    fn idle_end(&self) -> Option<Instant> {
        let allowed = self.config.idle_exit_seconds;
        let unused = self.connections.is_empty() && self.watched.is_empty();
        (allowed != 0 && unused).then(|| self.last_use + Duration::from_secs(allowed))
    }

    /// What has happened to the daemon itself. What has happened to users is returned, by user. `None` when the daemon is to
    /// end.
    fn on_events(
        &mut self,
        mut events: Vec<(Token, EpollFlags)>,
    ) -> Option<Turns<(Token, EpollFlags)>> {
        let mut of_users = Turns::new(self.known.clone());
        put_behind(&mut events, self.served_last);
        for (token, flags) in events {
            if let Some(uid) = self.user_of(token) {
                of_users.push(uid, (token, flags));
                continue;
            }
            if token == Token::Signals && self.on_signal() {
                return None;
            }
            self.on_event(token, flags);
            self.turn.did(|| format!("{token:?}"));
        }
        Some(of_users)
    }

    /// On whose behalf an event is handled that is told of again if it is not.
    fn user_of(&self, token: Token) -> Option<u32> {
        match token {
            Token::Listener(number) => {
                let listener = self.endpoint.listeners().get(number as usize)?;
                Some(listener.user.unwrap_or(NOBODY))
            }
            Token::Connection(id) => Some(self.connections.get(id)?.peer.uid),
            _ => None,
        }
    }

    fn on_event(&mut self, token: Token, flags: EpollFlags) {
        match token {
            Token::Listener(number) => self.accept(number as usize),
            Token::Connection(id) => {
                if flags.contains(EpollFlags::EPOLLOUT) {
                    self.serve(id, |daemon| daemon.flush(id));
                }
                let gone = flags.intersects(EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR);
                self.serve(id, |daemon| daemon.receive_or_end(id, gone));
            }
            Token::Fabric => self.on_fabric(),
            Token::WantedBack => self.on_wanted_back(),
            Token::Anchors(listener) => self.on_anchors(listener as usize),
            Token::Call(ticket) => self.on_call(ticket),
            // Read already; and what porters have found waits with them.
            Token::Signals | Token::Found => {}
        }
    }

    fn on_due(&mut self, due: Due) {
        match due {
            Due::Handshake(id) => self.serve(id, |daemon| daemon.on_handshake_due(id)),
            Due::Send(id) => self.serve(id, |daemon| daemon.retry(id)),
            Due::Watch(id) => self.on_watch_due(id),
            Due::Stream(id, times) => self.look_again(id, times),
            Due::Anchor(ticket) => self.on_anchor_due(ticket),
            Due::Incoming(ticket) => self.on_incoming_due(ticket),
            Due::Call(ticket) => self.on_call_due(ticket),
            Due::Callers(listener) => self.let_callers_in(listener),
            Due::Anchors(listener) => self.on_anchors_due(listener),
            Due::Sweep => self.sweep(),
            Due::Stock => {
                let (size, huge) = (self.config.ring_size, self.config.huge_pages);
                if self.streams.restock(size, huge) {
                    // The next one in the next turn: others are served between.
                    self.agenda.after(Duration::ZERO, Due::Stock);
                }
            }
        }
    }

    fn has_notices(&self) -> bool {
        let fabric = self.fabric.as_ref();
        fabric.is_some_and(|fabric| fabric.is_busy())
    }

    fn on_find(&mut self, found: Found) {
        match found {
            Found::Message {
                connection,
                received,
            } => self.on_unpacked(connection, received),
            Found::Made {
                owner,
                program,
                made,
            } => self.on_made(owner, &program, made),
            Found::Attached {
                owner,
                passport,
                map,
            } => self.on_looked_at(owner, passport, map),
            Found::Namespace {
                owner,
                opened,
                announced,
            } => self.on_namespace(owner, opened, announced),
            Found::Sent { owner, sent } => self.on_sent(owner, sent),
            Found::Fetched { asker, fetched } => self.on_fetched(asker, fetched),
            Found::Listener(incoming, answer) => self.on_listener_found(*incoming, answer),
            Found::MadeTo { ticket, listener } => self.on_made_to(ticket, listener),
            Found::Anchor {
                ticket,
                cookie,
                is_its,
                early,
            } => self.on_anchor_looked_at(ticket, cookie, is_its, early),
            Found::Called {
                ticket,
                socket,
                called,
            } => self.on_called(ticket, socket, called),
            Found::Process { tenant, unchanged } => self.on_process(tenant, unchanged),
            Found::Pair {
                conn,
                whose,
                other,
                meeting,
                heard,
            } => self.on_pair(conn, whose, other, meeting, heard),
            Found::Ended(id) => {
                if let Some(streams) = self.unwatch(id) {
                    self.check_streams(&streams);
                }
                self.serve(id, |_| Err(End::Exited));
            }
            Found::Event(id, flags) => self.on_event(Token::Connection(id), flags),
            Found::Kept(looked_at) => self.on_kept(&looked_at),
            Found::Socket {
                tenant,
                errand,
                held,
            } => self.on_look(tenant, errand, held),
        }
    }

    fn on_signal(&mut self) -> bool {
        // Of several, the next turn is told.
        if let Ok(Some(signal)) = self.signals.read_signal() {
            if signal.ssi_signo != Signal::SIGHUP as u32 {
                return true;
            }
            self.reload();
        }
        false
    }

    fn reload(&mut self) {
        match self.args.config() {
            Ok(mut config) => {
                let socket = self.config.socket.clone();
                if config.socket != socket || config.log_level != self.config.log_level {
                    warn!("socket and logging change with a restart only");
                }
                if config.confine != self.config.confine {
                    warn!("confine changes with a restart only");
                }
                if config.sockets_for_users != self.config.sockets_for_users {
                    warn!("sockets_for_users changes with a restart only");
                }
                config.socket = socket;
                self.reload_fabric(&mut config);
                self.accounts.set_limits(config.limits(self.descriptors));
                self.config = config;
                self.tell_all_routes();
                info!("configuration read again; it counts for what comes from now on");
            }
            Err(error) => error!("the configuration stays as it was: {error}"),
        }
    }

    /// Says in the log which limit is in the way.
    fn log_over(&mut self, over: crate::accounts::Over, uid: u32, pid: i32) {
        self.journal.refusal(over.cause(), uid, pid);
    }
}
