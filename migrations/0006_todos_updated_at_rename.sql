-- Locks out 0.1.0, whose statements name the column: without this, a todo that it writes during
-- the next steps would break them.
alter table todos rename column updated_at to replaced_updated_at;
