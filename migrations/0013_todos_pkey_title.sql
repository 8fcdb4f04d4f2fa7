-- The primary key with the titles: one index for the lookup by ID and for the search of titles in
-- the order of creation, where there were two. Every update of a todo writes to all of them.
alter table todos
    drop constraint todos_pkey,
    add constraint todos_pkey primary key (owner_id, id) include (title_folded);
