-- Place a sample order once.
-- KEYS[4]: hash of placed orders. ARGV: namespace, consumer group, run, order id, order bytes,
-- again ('1': also when it was finished or buried before). Returns 1 when placed now.
local run, order_id, bytes, again = unpack(ARGV, 3, 6)
local state = redis.call('HGET', KEYS[4], order_id)
if state and (state == 'open' or again ~= '1') then return 0 end
redis.call('HSET', KEYS[4], order_id, 'open')
redis.call('SADD', NAMESPACE .. ':runs', run)
redis.call('XADD', STREAM, '*', 'id', order_id, 'run', run, 'order', bytes)
return 1
