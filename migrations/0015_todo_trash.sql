-- The deleted todos. UndeleteTodo moves a row back; after 30 days only the tombstone is left, and
-- after 31 days nothing.
--
-- Columns: those of todos, with the version of the deletion. All but the IDs and the version are
-- null once the content is purged.
create table todo_trash (
    owner_id uuid not null
        constraint todo_trash_clock_fkey references todo_clocks (owner_id) on delete cascade,
    id uuid not null,
    title text collate "C",
    title_folded text collate "C",
    description text collate "C",
    description_folded text collate "C",
    state smallint,
    version bigint not null,
    constraint todo_trash_pkey primary key (owner_id, id),
    constraint todo_trash_content_check check (
        num_nulls(title, title_folded, description, description_folded, state) in (0, 5)
    )
);
