-- The version replaces it.
alter table todos drop column replaced_updated_at;
