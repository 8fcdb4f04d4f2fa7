//! The settings of the builds for releases.

use std::{fs, path::Path};

fn read(file: &str) -> String {
    fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join(file)).expect("the file exists")
}

#[test]
fn binaries_for_arm64_start_with_pages_of_64_kib() {
    let (workflow, config) = (read(".github/workflows/release.yml"), read(".cargo/config.toml"));
    let targets = workflow.split("target: ").skip(1).filter_map(|rest| rest.split(' ').next());
    let arm64: Vec<_> = targets.filter(|target| target.starts_with("aarch64")).collect();
    assert_eq!(arm64.len(), 1, "{workflow}");
    for target in arm64 {
        // jemalloc's build reads the variable with the prefix of its target.
        let prefix = target.to_uppercase().replace('-', "_");
        let setting = format!("{prefix}_JEMALLOC_SYS_WITH_LG_PAGE = \"16\"");
        assert!(config.lines().any(|line| line == setting), "{setting} is not in:\n{config}");
    }
}

#[test]
fn no_profile_has_settings_for_the_service_alone() {
    // With such settings, cargo ignores `strip` of the profile for the binary.
    for profile in ["release", "dist"] {
        let section = format!("[profile.{profile}.package.fast-zero]");
        assert!(!read("Cargo.toml").contains(&section), "{section}");
    }
}
