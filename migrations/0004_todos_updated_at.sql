-- todos_owner_updated_at_title_idx does what this one did.
drop index todos_owner_updated_at_idx;
