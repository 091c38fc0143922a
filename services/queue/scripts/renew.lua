-- Heartbeat: reset the idle time of entries, each only while its owner still is its owner.
-- ARGV: namespace, consumer group, consumer, entry ids ...
-- Returns the ids that this consumer no longer owns.
local consumer, lost = ARGV[3], {}
for i = 4, #ARGV do
  local id = ARGV[i]
  if lease_of(id) == consumer then
    redis.call('XCLAIM', STREAM, GROUP, consumer, 0, id, 'JUSTID')
  else
    lost[#lost + 1] = id
  end
end
return lost
