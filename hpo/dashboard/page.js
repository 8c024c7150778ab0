// Beside optuna-dashboard's own script, and before it: what its pages do not say of our refusals.
(() => {
  const ask = window.fetch;
  const silent = /^\/api\/studies(\/\d+(\/rename)?)?$/; // of these it shows no reason

  const show = (reason) => {
    const place = document.getElementById("hpo-refusal");
    place.textContent = reason;
    place.hidden = false;
    setTimeout(() => { place.hidden = true; }, 10000);
  };

  window.fetch = async (address, options) => {
    const answer = await ask(address, options);
    if (answer.status === 401) {
      location.assign(`/login?next=${encodeURIComponent(location.pathname)}`);
    } else if (!answer.ok && options?.method && silent.test(address)) {
      answer.clone().json().then(({ reason }) => show(reason), () => {});
    }
    return answer;
  };
})();
