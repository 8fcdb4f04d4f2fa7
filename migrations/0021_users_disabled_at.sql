-- The time when an operator disabled the user. A disabled user has no session and no personal access
-- token, and gets none. Version 0.1.0 does not know the column, and would open sessions: all of its
-- replicas are stopped before the migrations.
alter table users add column disabled_at timestamptz;
