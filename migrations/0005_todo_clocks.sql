-- The clock of an owner: every write to the owner's todos takes this row first and moves it on.
-- So the versions of an owner's todos increase in the order in which their changes become
-- visible. An owner without a row has never had a todo.
--
-- Version: microseconds since 1970, or one more than before, whichever is greater.
--
-- Fill factor: every update finds free space on its page, so that it changes no index.
create table todo_clocks (
    owner_id uuid not null
        constraint todo_clocks_pkey primary key
        constraint todo_clocks_owner_id_fkey references users (id) on delete cascade,
    version bigint not null
) with (fillfactor = 50);
