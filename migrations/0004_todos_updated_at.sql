-- todos_owner_updated_at_title_idx does what this one did. Calls wait for a moment, and for
-- those who read the table longer than that: a backup, say.
drop index todos_owner_updated_at_idx;
