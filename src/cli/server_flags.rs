//! The flags of the server beside a health check.
//!
//! The health check of a container gets the environment of the server, but not its flags. There,
//! the command line of the server is readable.

use std::{
    ffi::{OsStr, OsString},
    fs,
    os::unix::{ffi::OsStrExt, process::parent_id},
};

use clap::{ArgMatches, Command, parser::ValueSource};

/// Returns the arguments of the only server that runs this program beside this process, in the
/// same container. `parse` parses a command line.
pub(super) fn server_beside(
    parse: impl Fn(Vec<OsString>) -> Option<ArgMatches>,
) -> Option<ArgMatches> {
    let program = |process: &str| fs::read_link(format!("/proc/{process}/exe")).ok();
    let own_program = program("self")?;
    let mut servers = processes().into_iter().filter_map(|process| {
        let is_same = program(&process)? == own_program;
        let matches = parse(command_line(&process).filter(|_| is_same)?)?;
        server_arguments(&matches).cloned()
    });
    let server = servers.next();
    server.filter(|_| servers.next().is_none())
}

/// Returns the processes that may be the server of a container: all, if an engine started this
/// process there, so that its parent is outside. Otherwise only the first process, because a
/// machine may have other servers.
fn processes() -> Vec<String> {
    if parent_id() != 0 {
        return vec!["1".to_owned()];
    }
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())).collect()
}

fn command_line(process: &str) -> Option<Vec<OsString>> {
    let text = fs::read(format!("/proc/{process}/cmdline")).ok()?;
    let text = text.strip_suffix(b"\0").unwrap_or(&text);
    Some(text.split(|byte| *byte == 0).map(|arg| OsStr::from_bytes(arg).to_owned()).collect())
}

/// Returns the arguments of a server; `None` for other subcommands.
fn server_arguments(matches: &ArgMatches) -> Option<&ArgMatches> {
    match matches.subcommand() {
        None => Some(matches),
        Some(("serve", server)) => Some(server),
        Some(_) => None,
    }
}

/// Returns those flags of a server that `command` knows and that its own command line does not
/// contain.
pub(super) fn known_to(command: &Command, own: &ArgMatches, server: &ArgMatches) -> Vec<OsString> {
    let is_flag =
        |matches: &ArgMatches, id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    let mut flags = Vec::new();
    for arg in command.get_arguments() {
        let id = arg.get_id().as_str();
        let Some(name) = arg.get_long().filter(|_| server.try_contains_id(id).is_ok()) else {
            continue;
        };
        if is_flag(server, id) && !is_flag(own, id) {
            for value in server.get_raw(id).into_iter().flatten() {
                let mut flag = OsString::from(format!("--{name}="));
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
        let server = parse(server);
        server_arguments(&server).map_or(Vec::new(), |server| known_to(command, own, server))
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
