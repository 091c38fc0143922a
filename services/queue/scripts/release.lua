-- Hand an entry back at once without counting the delivery.
-- ARGV: namespace, consumer group, entry id, consumer, lease ms.
local id, consumer, lease_ms = unpack(ARGV, 3, 5)
local owner, _, deliveries = lease_of(id)
if owner ~= consumer then return 0 end
hand_back(id, consumer, lease_ms, deliveries - 1)
return 1
