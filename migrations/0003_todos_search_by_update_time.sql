-- The same for lists in the order of their changes. Writes wait meanwhile, half a second
-- for a million to-dos.
create index todos_owner_updated_at_title_idx
    on todos (owner_id, updated_at, id) include (title_folded);
