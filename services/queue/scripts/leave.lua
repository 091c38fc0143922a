-- A consumer goes: hand back all that is still its own, uncounted; forget its name if it has none.
-- ARGV: namespace, consumer group, consumer, lease ms.
local consumer, lease_ms = ARGV[3], ARGV[4]
local rows = redis.call('XPENDING', STREAM, GROUP, '-', '+', 100000, consumer)
for _, row in ipairs(rows) do hand_back(row[1], consumer, lease_ms, row[4] - 1) end
if #rows == 0 then redis.call('XGROUP', 'DELCONSUMER', STREAM, GROUP, consumer) end
return #rows
