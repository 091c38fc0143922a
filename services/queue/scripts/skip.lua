-- Acknowledge an entry that needs no work any more.
-- ARGV: namespace, consumer group, entry id.
return retire(ARGV[3]) and 1 or 0
