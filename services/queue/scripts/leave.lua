-- A consumer goes: hand back all that is still its own, uncounted; forget its name if it has none.
-- ARGV: namespace, consumer group, consumer, lease ms.
local consumer, lease_ms = ARGV[3], tonumber(ARGV[4])
local rows = redis.call('XPENDING', STREAM, GROUP, '-', '+', 100000, consumer)
for _, row in ipairs(rows) do
  -- Idle for a whole lease: failed, released, or handed back when this was asked before.
  if row[3] < lease_ms then hand_back(row[1], consumer, lease_ms, row[4] - 1) end
end
if #rows == 0 then redis.call('XGROUP', 'DELCONSUMER', STREAM, GROUP, consumer) end
return #rows
