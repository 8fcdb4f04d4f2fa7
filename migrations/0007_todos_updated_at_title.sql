-- todos_owner_version_key replaces it. Dropped first, so that the next step does not update it.
drop index todos_owner_updated_at_title_idx;
