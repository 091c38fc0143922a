-- The trainer is done with groups for good: acknowledge, delete payloads, trim.
-- ARGV: namespace, consumer group, then (entry id, group id) pairs. Returns entries acknowledged.
local acknowledged = 0
for i = 3, #ARGV, 2 do
  acknowledged = acknowledged + redis.call('XACK', STREAM, GROUP, ARGV[i])
  redis.call('UNLINK', NAMESPACE .. ':group:' .. ARGV[i + 1])
end
trim(STREAM)
return acknowledged
