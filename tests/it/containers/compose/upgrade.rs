//! The upgrade of PostgreSQL in `docs/deployment.md`, from one major version to the next.

use std::fs;

use super::{APP, BASE, DATABASE, UPGRADES};
use crate::support::{
    PASSWORD,
    compose::{
        Stack, combined_output, docker_command, expect_success, is_engine_available, run_command,
    },
    postgres::print_line,
    readme::{DEPLOYMENT, subsection_blocks},
    todos::todo_titled,
};

/// The image and the volume before the upgrade, and after it.
const OLD: [(&str, &str); 2] =
    [("postgres:18", "postgres:17"), ("pgdata:/var/lib/postgresql", OLD_MOUNT)];
const NEW: [(&str, &str); 3] = [
    ("postgres:17", "postgres:18"),
    (OLD_MOUNT, "pgdata18:/var/lib/postgresql"),
    ("  pgdata:", "  pgdata18:"),
];

/// Up to version 17, the image stores its data in this directory.
const OLD_MOUNT: &str = "pgdata:/var/lib/postgresql/data";

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn an_upgrade_of_postgres_loses_no_acknowledged_write() {
    if !is_engine_available() || !has_image("postgres:17").await {
        return;
    }
    let stack = Stack::configured(&[BASE]);
    edit_compose(&stack, &OLD);
    let [dump, restore, remove] = subsection_blocks(DEPLOYMENT, UPGRADES)[..] else {
        panic!("the upgrade has three blocks");
    };
    stack.compose(&["up", "--build", "--wait"]).await;
    assert!(server_version(&stack).await.starts_with("17"));

    // Writes until the service stops. The dump must contain every acknowledged one.
    let ana = stack.anonymous().await.signed_up("ana").await;
    let writing = tokio::spawn({
        let ana = ana.clone();
        async move {
            let mut acknowledged = 0;
            while ana.try_create_todo(Some(todo_titled("Keep"))).await.is_ok() {
                acknowledged += 1;
            }
            acknowledged
        }
    });
    expect_success(paste(&stack, dump).await);
    let acknowledged: i64 = writing.await.expect("no panic");
    assert!(acknowledged > 0);
    edit_compose(&stack, &NEW);

    // A dump that is not complete ends the upgrade, and the old volume stays.
    let good = fs::read(stack.path("upgrade.dump")).expect("a dump");
    fs::write(stack.path("upgrade.dump"), &good[..good.len() / 2]).expect("written");
    let failed = paste(&stack, restore).await;
    assert!(!failed.status.success(), "{}", combined_output(&failed));
    assert!(!paste(&stack, remove).await.status.success(), "the counts are unknown");
    assert_eq!(stack.containers(APP).await, [""; 0], "the service does not start without data");
    // A write that is missing in the new database does, too.
    fs::write(stack.path("upgrade.dump"), &good).expect("written");
    let counts = fs::read_to_string(stack.path("counts.before")).expect("counts");
    fs::write(stack.path("counts.before"), counts.replace("users|1", "users|2")).expect("written");
    let failed = paste(&stack, restore).await;
    assert!(combined_output(&failed).contains("users|2"), "{}", combined_output(&failed));
    assert!(!failed.status.success(), "{}", combined_output(&failed));
    assert!(!paste(&stack, remove).await.status.success(), "the counts differ");
    assert_eq!(stack.containers(APP).await, [""; 0], "the service does not start without data");
    assert!(has_volume(&stack, "pgdata").await);

    stack.compose(&["down"]).await;
    let new_volume = format!("{}_pgdata18", stack.project);
    expect_success(run_command(docker_command(&["volume", "rm", &new_volume])).await);
    fs::write(stack.path("counts.before"), counts).expect("written");
    expect_success(paste(&stack, restore).await);
    assert!(server_version(&stack).await.starts_with("18"));
    let anonymous = stack.anonymous().await;
    anonymous.logged_in("ana", PASSWORD).await.expect("ana still exists");
    let stored = sqlx::query_scalar("select count(*) from todos");
    let stored: i64 = stored.fetch_one(&mut stack.connect_database().await).await.expect("a count");
    // The stop may have cut off the response of the last write.
    assert!([acknowledged, acknowledged + 1].contains(&stored), "{acknowledged} {stored}");
    // Two counts of no table are equal, and compare nothing.
    let counts = ["counts.before", "counts.after"].map(|name| stack.path(name));
    let contents = counts.clone().map(|path| fs::read(path).expect("counts"));
    for path in &counts {
        fs::write(path, "").expect("written");
    }
    assert!(!paste(&stack, remove).await.status.success(), "nothing was compared");
    assert!(has_volume(&stack, "pgdata").await);
    for (path, content) in counts.iter().zip(contents) {
        fs::write(path, content).expect("written");
    }
    expect_success(paste(&stack, remove).await);
    assert!(!has_volume(&stack, "pgdata").await);
}

#[tokio::test]
#[ignore = "needs a Docker engine"]
async fn a_failed_backup_leaves_the_previous_one() {
    if !is_engine_available() {
        return;
    }
    let stack = Stack::configured(&[BASE]);
    let [backup, restore] = subsection_blocks(DEPLOYMENT, "Backups")[..] else {
        panic!("the backup has two blocks");
    };
    stack.compose(&["up", "--wait", DATABASE]).await;
    expect_success(paste(&stack, backup).await);
    let dump = fs::read(stack.path("backup.dump")).expect("a dump");
    stack.compose(&["stop", DATABASE]).await;
    assert!(!paste(&stack, backup).await.status.success());
    assert_eq!(fs::read(stack.path("backup.dump")).expect("a dump"), dump);

    stack.compose(&["start", DATABASE]).await;
    stack.wait_until_health(DATABASE, "healthy").await;
    fs::write(stack.path("backup.dump"), &dump[..dump.len() / 2]).expect("written");
    assert!(!paste(&stack, restore).await.status.success());
    assert_eq!(stack.containers(APP).await, [""; 0], "the service does not start");
}

/// Pastes a block into an interactive shell, in which a failed command ends nothing by itself.
async fn paste(stack: &Stack, block: &str) -> std::process::Output {
    let mut shell = stack.command("bash");
    shell.args(["-c", &block.replace("fast-zero_", &format!("{}_", stack.project))]);
    run_command(shell).await
}

fn edit_compose(stack: &Stack, edits: &[(&str, &str)]) {
    let file = stack.path(BASE);
    let text = fs::read_to_string(&file).expect("the file exists");
    let edited = edits.iter().fold(text, |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replace(from, to)
    });
    fs::write(file, edited).expect("written");
}

/// Returns `true` if the engine has the image, or can pull it. Otherwise prints that the test is
/// skipped.
async fn has_image(image: &str) -> bool {
    for arguments in [["image", "inspect", image], ["pull", "--quiet", image]] {
        if run_command(docker_command(&arguments)).await.status.success() {
            return true;
        }
    }
    print_line(&format!("SKIPPED: the upgrade of PostgreSQL: no image {image}"));
    false
}

async fn has_volume(stack: &Stack, volume: &str) -> bool {
    let volume = format!("{}_{volume}", stack.project);
    run_command(docker_command(&["volume", "inspect", &volume])).await.status.success()
}

async fn server_version(stack: &Stack) -> String {
    let version = sqlx::query_scalar("show server_version");
    version.fetch_one(&mut stack.connect_database().await).await.expect("a version")
}
