-- The first one.
insert into database_incarnation (id) values (gen_random_uuid());
