//! A process of a differential program: carries out the socket calls that the conductor names. A plain program, that runs
//! with the shim or without it.

fn main() {
    let mut words = std::env::args().skip(1);
    let (Some(socket), Some(name)) = (words.next(), words.next()) else {
        eprintln!("usage: rdsock-differential-actor SOCKET NAME [END=DESCRIPTOR...]");
        std::process::exit(2);
    };
    rdsock_differential::actor::play(socket.into(), &name, words);
}
