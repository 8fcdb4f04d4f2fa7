//! `fast-zero methods`: prints the methods of the API and who may call them.

use std::io::{self, Write};

use crate::rpc::policy::{METHODS, Method};

/// Prints the table of `proto/`, as Markdown, which a terminal shows well enough.
pub(super) fn run() -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "| method | access | scope | response |")?;
    writeln!(out, "| --- | --- | --- | --- |")?;
    METHODS.iter().try_for_each(|method| {
        let (name, access) = (method.name(), method.access.name());
        let (scope, response) = (method.scope.unwrap_or("-"), response(method));
        writeln!(out, "| `{name}` | {access} | {scope} | {response} |")
    })
}

fn response(method: &Method) -> &'static str {
    match (method.server_streaming, method.large_response) {
        (true, _) => "stream",
        (false, true) => "unary, up to 1 MiB",
        (false, false) => "unary",
    }
}
