-- Bury an entry now, whatever its deliveries: its error cannot be cured by trying again.
-- ARGV: namespace, consumer group, entry id, consumer, error.
-- Returns: dead | lost.
local id, consumer, error = unpack(ARGV, 3, 5)
local owner, _, deliveries = lease_of(id)
if owner ~= consumer then return 'lost' end
bury(id, deliveries, error, 'dead')
return 'dead'
