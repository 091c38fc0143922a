-- Record a failed delivery; hand the entry back at once, or bury it after the last delivery.
-- ARGV: namespace, consumer group, entry id, consumer, lease ms, max deliveries, error.
-- Returns: retry | dead | lost (another consumer has it, or it is done).
local id, consumer, lease_ms, max_deliveries, error = unpack(ARGV, 3, 7)
local owner, _, deliveries = lease_of(id)
if owner ~= consumer then return 'lost' end
if deliveries >= tonumber(max_deliveries) then
  bury(id, deliveries, error, 'dead')
  return 'dead'
end
local entry = to_table(read_entry(id))
if entry.view then
  local group = NAMESPACE .. ':group:' .. entry.group
  if redis.call('EXISTS', group) == 1 then
    redis.call('HSET', group, 'failure:' .. entry.view, error)
  end
end
hand_back(id, consumer, lease_ms, deliveries)
return 'retry'
