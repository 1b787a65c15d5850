// A web server that answers with its name, and logs whom.
'use strict';
const [name, port] = process.argv.slice(2);
const server = require('http').createServer((request, response) => {
  const {remoteAddress, remotePort} = request.socket;
  process.stdout.write(`${remoteAddress} ${remotePort} ${request.method}\n`);
  response.end(name);
});
server.keepAliveTimeout = 0;  // none
server.listen(Number(port), '0.0.0.0');
