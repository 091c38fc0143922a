-- Finish an order: acknowledge it and drop the memory of what it submitted.
-- KEYS[4]: hash of placed orders, KEYS[5]: submitted set. ARGV: namespace, consumer group,
-- entry id, order id. Returns 1 when it was open.
if not retire(ARGV[3]) then return 0 end
redis.call('HSET', KEYS[4], ARGV[4], 'done')
redis.call('UNLINK', KEYS[5])
return 1
