-- The primary key replaces it, with the titles of todos_pkey_title. Dropped first, so that the next
-- step does not update it.
drop index todos_owner_id_title_idx;
