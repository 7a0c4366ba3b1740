//! `rdsock doctor`: what this machine has for rdsock, and what to do about what it lacks.

mod fabric;
mod kernel;
mod memory;
mod setup;

use std::process::ExitCode;

use rdsock_output::{OutputError, line};
use serde::Serialize;

use crate::cli::DoctorArgs;

/// How something is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Health {
    /// As it should be.
    Good,
    /// It works, and could be better.
    Weak,
    /// Nothing is accelerated without it.
    Bad,
}

/// One thing that was looked at.
#[derive(Debug, Serialize)]
pub struct Finding {
    /// What.
    pub what: &'static str,
    /// How it is.
    pub health: Health,
    /// What was found.
    pub found: String,
    /// What to do.
    pub advice: Option<String>,
}

impl Finding {
    fn good(what: &'static str, found: impl Into<String>) -> Self {
        Finding {
            what,
            health: Health::Good,
            found: found.into(),
            advice: None,
        }
    }

    fn new(what: &'static str, health: Health, found: impl Into<String>, advice: &str) -> Self {
        Finding {
            what,
            health,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }
}

/// Prints what was found. Fails when rdsock can't be used.
pub fn doctor(args: &DoctorArgs) -> Result<ExitCode, OutputError> {
    let fabric = fabric::look(args.config.as_deref());
    let findings: Vec<Finding> = [kernel::look(), memory::look(), setup::look(), fabric]
        .into_iter()
        .flatten()
        .collect();
    let usable = findings.iter().all(|finding| finding.health != Health::Bad);
    if args.json {
        let findings = serde_json::json!({ "usable": usable, "findings": findings });
        rdsock_output::json(findings)?;
    } else {
        print(&findings, usable)?;
    }
    Ok(ExitCode::from(u8::from(!usable)))
}

fn print(findings: &[Finding], usable: bool) -> Result<(), OutputError> {
    let width = findings
        .iter()
        .map(|finding| finding.what.len())
        .max()
        .unwrap_or(0);
    for finding in findings {
        let sign = match finding.health {
            Health::Good => "  ok",
            Health::Weak => "  --",
            Health::Bad => "  NO",
        };
        line!("{sign}  {:width$}  {}", finding.what, finding.found)?;
        if let Some(advice) = &finding.advice {
            line!("      {:width$}  -> {advice}", "")?;
        }
    }
    match usable {
        true => line!("rdsock can be used here"),
        false => {
            line!("rdsock can't accelerate anything here until the points marked NO are seen to")
        }
    }
}
