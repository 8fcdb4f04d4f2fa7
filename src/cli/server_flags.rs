//! The flags of the server beside a health check.
//!
//! The health check of a container gets the environment of the server, but not its flags. There,
//! the server is the first process, and its command line is readable.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::ffi::OsStrExt,
};

use clap::{ArgMatches, Command, parser::ValueSource};

/// Returns the command line of the first process, if it runs this program.
pub(super) fn first_process() -> Option<Vec<OsString>> {
    let program = |process: &str| fs::read_link(format!("/proc/{process}/exe")).ok();
    if program("1")? != program("self")? {
        return None;
    }
    let text = fs::read("/proc/1/cmdline").ok()?;
    let text = text.strip_suffix(b"\0").unwrap_or(&text);
    Some(text.split(|byte| *byte == 0).map(|arg| OsStr::from_bytes(arg).to_owned()).collect())
}

/// Returns those flags of a server that `command` knows and that its own command line does not
/// contain; none if the other process is no server.
pub(super) fn known_to(command: &Command, own: &ArgMatches, server: &ArgMatches) -> Vec<OsString> {
    let server = match server.subcommand() {
        None => server,
        Some(("serve", server)) => server,
        Some(_) => return Vec::new(),
    };
    let is_flag =
        |matches: &ArgMatches, id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let mut flags = Vec::new();
    for arg in command.get_arguments() {
        let id = arg.get_id().as_str();
        let is_known = server.try_contains_id(id).is_ok() && arg.get_long().is_some();
        if is_known && is_flag(server, id) && !is_flag(own, id) {
            for value in server.get_raw(id).into_iter().flatten() {
                let mut flag = OsString::from(format!("--{}=", arg.get_long().unwrap_or_default()));
                flag.push(value);
                flags.push(flag);
            }
        }
    }
    flags
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Arguments;

    /// Returns the flags that a health check takes from a server.
    fn adopted(check: &[&str], server: &[&str]) -> Vec<OsString> {
        let command = Arguments::command();
        let parse =
            |args: &[&str]| command.clone().get_matches_from([&["fast-zero"], args].concat());
        let own = parse(&[&["healthcheck"], check].concat());
        let own = own.subcommand_matches("healthcheck").expect("the subcommand");
        let command = command.find_subcommand("healthcheck").expect("the subcommand");
        known_to(command, own, &parse(server))
    }

    #[test]
    fn a_health_check_takes_the_flags_of_a_server() {
        let flags = ["--listen-addr", "0.0.0.0:1", "--tls-cert-file=a", "--reflection"];
        let taken = ["--listen-addr=0.0.0.0:1", "--tls-cert-file=a"];
        assert_eq!(adopted(&[], &flags), taken);
        assert_eq!(adopted(&[], &[&["serve"], &flags[..]].concat()), taken);
        assert_eq!(adopted(&["--listen-addr", "127.0.0.1:2"], &flags), ["--tls-cert-file=a"]);
        assert!(adopted(&[], &["healthcheck", "--listen-addr", "0.0.0.0:1"]).is_empty());
        assert!(adopted(&[], &["migrate"]).is_empty());
        assert!(adopted(&[], &[]).is_empty());
    }
}
