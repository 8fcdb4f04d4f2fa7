-- Fails if a write goes around the clock. Also the order of lists by update time, with the titles,
-- so that searching them reads this index and not the rows.
create unique index todos_owner_version_key
    on todos (owner_id, version) include (id, title_folded);
