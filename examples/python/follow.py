"""Follows the todos of a user: keeps a copy of them in step with the server, in a SQLite file.

Two parts are meant to be copied: `Copy` stores the todos and the cursor, and `follow` watches,
resumes and reconnects.
"""

import os
import random
import sqlite3
import sys
import time

import grpc

from fastzero.todo.v1 import todo_service_pb2, todo_service_pb2_grpc
from session import REFRESHABLE, ErrorDetails, Session, authorization, run

# Seconds. The delay before a watch doubles with each failure in a row.
INITIAL_BACKOFF, MAX_BACKOFF = 0.5, 30.0

# Errors that a retry does not cure. A watch changes nothing, so it is safe to retry all others.
FINAL = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.UNIMPLEMENTED,
}

# Pings a connection that is silent for 30 seconds: otherwise, a client whose network has lost the
# connection without a word would wait forever.
OPTIONS = [
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
]

SCHEMA = """
create table if not exists todos (id text primary key, todo blob not null, seen integer not null);
create table if not exists position (id integer primary key check (id = 0), cursor text not null);
insert or ignore into position values (0, '');
"""


class Copy:
    """The todos and the cursor, in one database: a transaction changes them together.

    A copy is of one user. `seen` marks the todos that the latest full sync contained.
    """

    def __init__(self, path):
        self._database = sqlite3.connect(path)
        self._database.executescript(SCHEMA)

    def apply(self, message):
        """Applies a message of WatchTodos, or a response of SyncTodos. A repetition is harmless."""
        with self._database as database:
            if message.full and not self.cursor():
                # A full sync starts: mark.
                database.execute("update todos set seen = false")
            for change in message.changes:
                if change.HasField("todo"):
                    row = (change.todo.id, change.todo.SerializeToString())
                    database.execute("insert or replace into todos values (?, ?, true)", row)
                else:
                    row = (change.deleted.todo.id,)
                    database.execute("delete from todos where id = ?", row)
            if message.full and message.caught_up:
                # The full sync ends: sweep. A client that also creates todos must not remove those
                # that it has not sent to the server yet.
                database.execute("delete from todos where not seen")
            database.execute("update position set cursor = ?", (message.cursor,))

    def cursor(self):
        """The position in the changes of the user, or an empty string before a full sync."""
        return self._database.execute("select cursor from position").fetchone()[0]

    def start_over(self):
        """Makes the next watch start with a full sync. Until its end, the copy has the old todos."""
        with self._database as database:
            database.execute("update position set cursor = ''")

    def todos(self):
        """The todos, the oldest first."""
        rows = self._database.execute("select todo from todos order by id")
        return [todo_service_pb2.Todo.FromString(row[0]) for row in rows]


def follow(channel, session, copy, on_message):
    """Keeps the copy in step. Returns only by an error that a retry does not cure."""
    todos = todo_service_pb2_grpc.TodoServiceStub(channel)
    rejected, backoff = None, INITIAL_BACKOFF
    # Whether a watch has failed with TOKEN_INVALID since the last message.
    was_invalid = False
    while True:
        retry_delay = 0
        try:
            access_token = session.access_token(rejected)
            request = todo_service_pb2.WatchTodosRequest(cursor=copy.cursor())
            for message in todos.WatchTodos(request, metadata=[authorization(access_token)]):
                copy.apply(message)
                on_message(message)
                backoff, was_invalid = INITIAL_BACKOFF, False
        except grpc.RpcError as error:
            details = ErrorDetails.from_error(error)
            print(f"watch ended: {error.code().name} {details.reason}")
            is_invalid = details.reason == "TOKEN_INVALID"
            if details.reason == "CURSOR_EXPIRED":
                copy.start_over()
            elif is_invalid and was_invalid:
                # A refresh did not help.
                raise
            elif details.reason in REFRESHABLE:
                rejected, was_invalid = access_token, was_invalid or is_invalid
            elif error.code() in FINAL:
                raise
            retry_delay = details.retry_delay or 0
        time.sleep(retry_delay + random.uniform(0, backoff))
        backoff = min(2 * backoff, MAX_BACKOFF)


def main(channel):
    # Print each line at once, also into a pipe.
    sys.stdout.reconfigure(line_buffering=True)
    copy = Copy(os.environ.get("FASTZERO_COPY", "todos.sqlite"))

    def show(message):
        if message.full:
            print("full sync")
        for change in message.changes:
            if change.HasField("todo"):
                print(f"changed: {change.todo.title}")
            else:
                print(f"deleted: {change.deleted.todo.title}")
        if message.caught_up:
            todos = copy.todos()
            print(f"caught up: {len(todos)} todos")
            for todo in todos:
                state = todo_service_pb2.TodoState.Name(todo.state)
                print(f"  {todo.etag} {state} {todo.title}")

    follow(channel, Session.open(channel), copy, show)


if __name__ == "__main__":
    try:
        run(main, OPTIONS)
    except KeyboardInterrupt:
        pass
