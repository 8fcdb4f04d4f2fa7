-- The primary key replaces it.
drop index todos_owner_id_title_idx;
