-- Hand an entry back at once without counting the delivery.
-- ARGV: namespace, consumer group, entry id, consumer, lease ms, deliveries before this one.
local id, consumer, lease_ms, deliveries = unpack(ARGV, 3, 6)
if lease_of(id) ~= consumer then return 0 end
hand_back(id, consumer, lease_ms, deliveries)
return 1
