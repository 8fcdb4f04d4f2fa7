"""The session of a client of fast-zero: logs in, and keeps calls authenticated.

Two parts are meant to be copied: `Session` refreshes the access token, and `ErrorDetails` reads
the reason of an error.
"""

import os
import sys
import threading
import time
from dataclasses import dataclass, field

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_status import rpc_status

from fastzero.auth.v1 import auth_service_pb2, auth_service_pb2_grpc
from fastzero.user.v1 import user_service_pb2, user_service_pb2_grpc

USERNAME = "ana"
PASSWORD = "correct horse"

# Seconds until a call's deadline. The server allows 5 seconds at most.
CALL_TIMEOUT = 3.0

# The reasons after which a client refreshes its access token. A token with a retired key is
# TOKEN_INVALID, while its session may still be active.
REFRESHABLE = {"TOKEN_EXPIRED", "TOKEN_INVALID"}


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


class Session:
    """The tokens of a login."""

    def __init__(self, channel, tokens):
        # RefreshToken needs no access token, so its channel has no interceptor.
        self._auth = auth_service_pb2_grpc.AuthServiceStub(channel)
        self._tokens = tokens
        self._lock = threading.Lock()

    @classmethod
    def open(cls, channel):
        """Resumes the session of the environment, or logs in."""
        if access_token := os.environ.get("FASTZERO_ACCESS_TOKEN"):
            tokens = auth_service_pb2.TokenSet(
                access_token=access_token, refresh_token=os.environ["FASTZERO_REFRESH_TOKEN"]
            )
        else:
            tokens = log_in(channel)
        return cls(channel, tokens)

    def access_token(self, rejected=None):
        """Returns the access token, after a refresh if it still is the rejected one."""
        # The first of several concurrent calls refreshes; the others wait and use its token.
        with self._lock:
            if self._tokens.access_token == rejected:
                request = auth_service_pb2.RefreshTokenRequest(
                    refresh_token=self._tokens.refresh_token
                )
                self._tokens = self._auth.RefreshToken(request, timeout=CALL_TIMEOUT).tokens
                print("refreshed the access token")
            return self._tokens.access_token


class RefreshInterceptor(grpc.UnaryUnaryClientInterceptor):
    """Sends the access token with each call and refreshes it when the server rejects it.

    The server reports the expiry (TOKEN_EXPIRED), so the client's clock does not matter.
    """

    def __init__(self, session):
        self._session = session

    def intercept_unary_unary(self, continuation, details, request):
        deadline = time.monotonic() + (details.timeout or CALL_TIMEOUT)

        def attempt(access_token):
            # gRPC passes the details as a named tuple.
            changed = details._replace(
                timeout=max(0, deadline - time.monotonic()),
                metadata=[*(details.metadata or ()), authorization(access_token)],
            )
            return continuation(changed, request)

        access_token = self._session.access_token()
        call = attempt(access_token)
        error = call.exception()
        if error is None or ErrorDetails.from_error(error).reason not in REFRESHABLE:
            return call
        return attempt(self._session.access_token(rejected=access_token))


def authorization(access_token):
    """The metadata entry that authenticates a call."""
    return ("authorization", f"Bearer {access_token}")


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


def run(program, options=()):
    """Runs a program with a channel. An error of a call ends the process."""
    address = os.environ.get("FASTZERO_ADDR", "localhost:50051")
    try:
        with grpc.insecure_channel(address, options) as channel:
            program(channel)
    except grpc.RpcError as error:
        details = ErrorDetails.from_error(error)
        print(f"{error.code().name}: {error.details()} ({details.reason})", file=sys.stderr)
        if details.retry_delay is not None:
            print(f"retry after {details.retry_delay:.0f} s", file=sys.stderr)
        sys.exit(1)
