"""A client of fast-zero: signs up, logs in, and creates, lists and updates todos.

Two parts are meant to be copied: `RefreshInterceptor` keeps calls authenticated, and
`ErrorDetails` reads the reason of an error.
"""

import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status

from fastzero.auth.v1 import auth_service_pb2, auth_service_pb2_grpc
from fastzero.todo.v1 import todo_service_pb2, todo_service_pb2_grpc
from fastzero.user.v1 import user_service_pb2, user_service_pb2_grpc

USERNAME = "ana"
PASSWORD = "correct horse"

# Seconds until a call's deadline. The server allows 5 seconds at most.
CALL_TIMEOUT = 3.0


@dataclass
class ErrorDetails:
    """The `google.rpc` details of an error. Programs decide by the reason."""

    reason: str = ""
    violations: dict[str, str] = field(default_factory=dict)
    retry_delay: float | None = None

    @classmethod
    def from_error(cls, error):
        details = cls()
        status = rpc_status.from_call(error)
        for detail in status.details if status else ():
            if detail.Unpack(info := ErrorInfo()) and info.domain == "fastzero":
                details.reason = info.reason
            elif detail.Unpack(request := BadRequest()):
                details.violations = {v.field: v.description for v in request.field_violations}
            elif detail.Unpack(retry := RetryInfo()):
                details.retry_delay = retry.retry_delay.ToTimedelta().total_seconds()
        return details


class RefreshInterceptor(grpc.UnaryUnaryClientInterceptor):
    """Sends the access token with each call and refreshes it once it has expired.

    The server reports the expiry (TOKEN_EXPIRED), so the client's clock does not matter.
    """

    def __init__(self, channel, tokens):
        # RefreshToken needs no access token, so its channel has no interceptor.
        self._auth = auth_service_pb2_grpc.AuthServiceStub(channel)
        self._tokens = tokens
        self._lock = threading.Lock()

    def intercept_unary_unary(self, continuation, details, request):
        deadline = time.monotonic() + (details.timeout or CALL_TIMEOUT)

        def attempt(access_token):
            authorization = ("authorization", f"Bearer {access_token}")
            # gRPC passes the details as a named tuple.
            changed = details._replace(
                timeout=max(0, deadline - time.monotonic()),
                metadata=[*(details.metadata or ()), authorization],
            )
            return continuation(changed, request)

        access_token = self._tokens.access_token
        call = attempt(access_token)
        error = call.exception()
        if error is None or ErrorDetails.from_error(error).reason != "TOKEN_EXPIRED":
            return call
        return attempt(self._refresh(access_token))

    def _refresh(self, expired):
        # The first of several concurrent calls refreshes; the others wait and use its token.
        with self._lock:
            if self._tokens.access_token == expired:
                request = auth_service_pb2.RefreshTokenRequest(
                    refresh_token=self._tokens.refresh_token
                )
                self._tokens = self._auth.RefreshToken(request, timeout=CALL_TIMEOUT).tokens
                print("refreshed the access token")
            return self._tokens.access_token


def log_in(channel):
    """Signs up unless the username exists, then logs in."""
    user = user_service_pb2.CreateUserRequest(
        username=USERNAME, email=f"{USERNAME}@example.com", password=PASSWORD
    )
    try:
        user_service_pb2_grpc.UserServiceStub(channel).CreateUser(user, timeout=CALL_TIMEOUT)
        print(f"signed up: {USERNAME}")
    except grpc.RpcError as error:
        if ErrorDetails.from_error(error).reason != "USERNAME_EXISTS":
            raise
        print("already signed up: USERNAME_EXISTS")
    auth = auth_service_pb2_grpc.AuthServiceStub(channel)
    login = auth_service_pb2.LoginRequest(login=USERNAME, password=PASSWORD)
    return auth.Login(login, timeout=CALL_TIMEOUT).tokens


def use_todos(todos):
    def create(title):
        request = todo_service_pb2.CreateTodoRequest(todo=todo_service_pb2.Todo(title=title))
        todos.CreateTodo(request, timeout=CALL_TIMEOUT)

    # Two concurrent calls: if the access token has expired, they refresh it once.
    with ThreadPoolExecutor() as pool:
        list(pool.map(create, ["Buy milk", "Water the plants"]))
    newest = todo_service_pb2.ListTodosRequest(order_by="create_time desc", page_size=2)
    page = todos.ListTodos(newest, timeout=CALL_TIMEOUT)
    for todo in page.todos:
        print(f"todo: {todo.title}")

    # The update changes the etag, so repeating it with the first etag fails.
    todo = page.todos[0]
    todo.state = todo_service_pb2.TODO_STATE_DOING
    update = todo_service_pb2.UpdateTodoRequest(todo=todo)
    todos.UpdateTodo(update, timeout=CALL_TIMEOUT)
    try:
        todos.UpdateTodo(update, timeout=CALL_TIMEOUT)
    except grpc.RpcError as error:
        print(f"stale etag: {ErrorDetails.from_error(error).reason}")
    try:
        create(" ")
    except grpc.RpcError as error:
        for path, description in ErrorDetails.from_error(error).violations.items():
            print(f"invalid field: {path}: {description}")


def main():
    with grpc.insecure_channel(os.environ.get("FASTZERO_ADDR", "localhost:50051")) as channel:
        if access_token := os.environ.get("FASTZERO_ACCESS_TOKEN"):
            tokens = auth_service_pb2.TokenSet(
                access_token=access_token, refresh_token=os.environ["FASTZERO_REFRESH_TOKEN"]
            )
        else:
            tokens = log_in(channel)
        authenticated = grpc.intercept_channel(channel, RefreshInterceptor(channel, tokens))
        use_todos(todo_service_pb2_grpc.TodoServiceStub(authenticated))


if __name__ == "__main__":
    try:
        main()
    except grpc.RpcError as error:
        details = ErrorDetails.from_error(error)
        print(f"{error.code().name}: {error.details()} ({details.reason})", file=sys.stderr)
        if details.retry_delay is not None:
            print(f"retry after {details.retry_delay:.0f} s", file=sys.stderr)
        sys.exit(1)
