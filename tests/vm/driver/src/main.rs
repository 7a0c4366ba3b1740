//! Tests of the driver on a kernel's own VFIO: `rdsock-vm-driver A B WAY SUITE`, in a virtual machine, with two rde devices at
//! the PCI addresses A and B, opened by their groups or by iommufd. Each test prints "TEST name ok" or "TEST name FAILED: why".

mod dma;
mod node;
mod traffic;
mod user;

use node::{Node, Place};
use rdsock_vfio::vfio::{PciDevice, Way};
use std::error::Error;
use std::process::ExitCode;

type Outcome = Result<(), Box<dyn Error>>;

/// What is tried, by the name of a test.
fn test(name: &str, body: impl FnOnce() -> Outcome) {
    match body() {
        Ok(()) => println!("TEST {name} ok"),
        Err(error) => println!("TEST {name} FAILED: {error}"),
    }
}

/// Fails with a text that says what was wrong.
fn check(holds: bool, what: impl FnOnce() -> String) -> Outcome {
    if holds { Ok(()) } else { Err(what().into()) }
}

/// Opens both devices, kept by the module or not.
fn both(a: &Place, b: &Place, kept: bool) -> Result<(Node, Node), Box<dyn Error>> {
    Ok((Node::open(a, 1, kept)?, Node::open(b, 2, kept)?))
}

fn run(a: &Place, b: &Place, suite: &str) -> Outcome {
    match suite {
        "kept" => {
            let mut nodes = None;
            let name = match a.way {
                Way::Group => "driver_opens_through_type1",
                Way::Iommufd => "driver_opens_through_iommufd",
            };
            test(name, || {
                nodes = Some(both(a, b, true)?);
                Ok(())
            });
            let (mut one, mut two) = nodes.ok_or("no devices")?;
            test("driver_has_huge_pages", || traffic::huge_pages(&one, &two));
            test("two_nodes_write_notify_and_mail", || {
                traffic::exchange(&mut one, &mut two)
            });
            test("interrupts_wake_a_sleeper", || {
                traffic::sleep_and_wake(&mut one, &mut two)
            });
            test("registers_of_the_page_are_not_the_drivers", || {
                node::page_is_kept(&one)
            });
            dma::tests(&mut one, &mut two);
            drop(two);
            test("killed_driver_leaves_no_dma_mapped", || {
                dma::killed(&mut one, b)
            });
        }
        "victim" => dma::victim(b)?,
        "unprivileged" => {
            user::become_driver()?;
            test("driver_runs_without_privilege", || {
                let (mut one, mut two) = both(a, b, true)?;
                traffic::exchange(&mut one, &mut two)
            });
            test("driver_finds_the_newest_way", || {
                let found = PciDevice::open(&a.address)?.way();
                check(found == a.way, || format!("it was opened by {found:?}"))
            });
            test("driver_is_told_of_the_locked_memory_limit", || {
                user::beyond_the_limit(&Node::open(a, 1, true)?)
            });
        }
        "plain" => test("driver_works_on_plain_vfio_pci", || {
            let (mut one, mut two) = both(a, b, false)?;
            traffic::exchange(&mut one, &mut two)
        }),
        _ => return Err(format!("there is no suite {suite}").into()),
    }
    Ok(())
}

fn main() -> ExitCode {
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .init();
    let args: Vec<String> = std::env::args().skip(1).collect();
    let [a, b, way, suite] = &args[..] else {
        eprintln!("usage: rdsock-vm-driver A B group|iommufd SUITE");
        return ExitCode::FAILURE;
    };
    let places = Place::parse(a, way).and_then(|a| Ok((a, Place::parse(b, way)?)));
    match places.and_then(|(a, b)| run(&a, &b, suite)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("rdsock-vm-driver: {error}");
            ExitCode::FAILURE
        }
    }
}
