-- Bury those of the entries whose deadline has passed, by the server's clock.
-- ARGV: namespace, consumer group, consumer, entry ids ... Returns the ids buried or lost.
local gone = {}
for i = 4, #ARGV do
  local id = ARGV[i]
  local owner, _, deliveries = lease_of(id)
  if owner ~= ARGV[3] then
    gone[#gone + 1] = id
  elseif expired(to_table(read_entry(id))) then
    bury(id, deliveries, EXPIRED_ERROR, 'expired')
    gone[#gone + 1] = id
  end
end
return gone
