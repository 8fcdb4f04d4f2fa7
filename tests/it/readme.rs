//! The README's tour works as pasted.

use tokio::process::Command;

use crate::support::{
    App,
    postgres::print_line,
    readme::{README, commands, has_grpcurl},
};

#[tokio::test]
async fn the_tour_works_as_pasted() {
    if !has_grpcurl().await {
        return;
    }
    let app = App::start().await;
    let address = app.address.to_string();
    let tour = commands(README, "A tour").replace("localhost:50051", &address);
    // As at a terminal, but the first failed command ends the shell.
    let shell = Command::new("bash").args(["-euo", "pipefail", "-c", &tour]).output().await;
    let shell = shell.expect("an installed bash");
    let (output, errors) =
        (String::from_utf8_lossy(&shell.stdout), String::from_utf8_lossy(&shell.stderr));
    assert!(shell.status.success(), "{output}\n{errors}");
    for shown in [
        "\"username\": \"ana\"",
        "\"title\": \"Read lib.rs\"",
        "\"title\": \"Buy milk\"",
        "\"state\": \"TODO_STATE_DONE\"",
        "\"userAgent\": \"grpcurl",
        "\"status\": \"SERVING\"",
        "grpc.reflection.v1.ServerReflection",
        "rpc ListTodos",
        "repeated .fastzero.todo.v1.TodoState states",
    ] {
        assert!(output.contains(shown), "{shown} is not in:\n{output}");
    }
}

#[tokio::test]
async fn grpcurl_shows_the_details_of_errors() {
    let app = App::start().await;
    let rejected = Command::new("grpcurl")
        .args(["-plaintext", "-d", "{}", &app.address.to_string()])
        .arg("fastzero.user.v1.UserService/CreateUser")
        .output();
    let Ok(rejected) = rejected.await else {
        print_line("SKIPPED: the details of errors: grpcurl is not on the PATH");
        return;
    };
    let errors = String::from_utf8_lossy(&rejected.stderr);
    for shown in ["\"reason\": \"INVALID_REQUEST\"", "\"field\": \"username\"", "\"requestId\""] {
        assert!(errors.contains(shown), "{shown} is not in:\n{errors}");
    }
}
