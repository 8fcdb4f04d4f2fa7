//! The documentation, and its shell commands.

use tokio::process::Command;

use super::postgres::print_line;

/// The text of the README.
pub const README: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/README.md"));
/// The text of `docs/api.md`.
pub const API: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/api.md"));
/// The text of `docs/configuration.md`.
pub const CONFIGURATION: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/configuration.md"));
/// The text of `docs/deployment.md`.
pub const DEPLOYMENT: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/deployment.md"));
/// The text of `docs/observability.md`.
pub const OBSERVABILITY: &str =
    include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/observability.md"));
/// The text of `docs/tls.md`.
pub const TLS: &str = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/tls.md"));

/// Returns the shell commands of a section of a document.
pub fn commands(document: &str, section: &str) -> String {
    let (_, rest) = document.split_once(&format!("\n## {section}\n")).expect("the section exists");
    blocks(rest.split("\n## ").next().unwrap_or(rest)).join("\n")
}

/// Returns the blocks of shell commands of a section within a section.
pub fn subsection_blocks<'a>(document: &'a str, subsection: &str) -> Vec<&'a str> {
    let (_, rest) =
        document.split_once(&format!("\n### {subsection}\n")).expect("the section exists");
    let rest = rest.split("\n## ").next().unwrap_or(rest);
    blocks(rest.split("\n### ").next().unwrap_or(rest))
}

/// Returns the blocks of shell commands of a text.
fn blocks(text: &str) -> Vec<&str> {
    text.split("```sh\n").skip(1).filter_map(|block| block.split("\n```").next()).collect()
}

/// Returns `true` if grpcurl is installed. Otherwise prints that the test is skipped.
pub async fn has_grpcurl() -> bool {
    let is_installed = Command::new("grpcurl").arg("--version").output().await.is_ok();
    if !is_installed {
        print_line("SKIPPED: the README's commands: grpcurl is not on the PATH");
    }
    is_installed
}
