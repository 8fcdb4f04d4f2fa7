-- The history that the cursors of SyncTodos and WatchTodos belong to, in one row. After a restore
-- from a backup, `fast-zero after-restore` replaces the ID, which expires all cursors.
create table database_incarnation (
    is_only boolean not null default true
        constraint database_incarnation_pkey primary key
        constraint database_incarnation_check check (is_only),
    id uuid not null
);
